"""A trained network from its checkpoint alone."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from batchless.data import ChannelStatistics
from batchless.runs import load_checkpoint, load_model_state
from batchless.surgery import ConversionReport, convert
from batchless.surgery.recognize import is_batch_normalization
from batchless.tasks.config import TrainConfig
from batchless.tasks.setup import TASKS
from batchless.train.device import require_device


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network and what is needed to use it.

    Attributes:
        model: converted, in evaluation mode.
        config: of the run.
        classes: in the order of the scores.
        statistics: by which images are normalized.
        path: the checkpoint.
    """

    model: nn.Module
    config: TrainConfig
    classes: tuple[str, ...]
    statistics: ChannelStatistics
    path: Path


def build_plain(config: TrainConfig, *, num_classes: int) -> nn.Module:
    """The run's network with plain BatchNorm and random weights."""
    return TASKS[config.task].build(config, num_classes)


def example_input(config: TrainConfig, model: nn.Module) -> tuple[object, ...]:
    """What `model`, the run's network, takes in evaluation, in its size: positional arguments."""
    return TASKS[config.task].example(config, model)


def build_converted(config: TrainConfig, model: nn.Module) -> tuple[nn.Module, ConversionReport]:
    """`model` with the run's normalizer, its pairs found by an example of what the run trains on."""
    return convert(model, config.normalizer, example=example_input(config, model))


def rebuild_converted(config: TrainConfig, *, num_classes: int, skip_init: bool) -> nn.Module:
    """The run's network with other weights: it has the same layers, so that a checkpoint of it fits.

    Which layers conversion makes depends on values in one case: with `none`, a normalization of zero gain becomes a
    SkipInit. A network with random weights may have such gains where the run's pretrained one had none. The global random
    state is left alone.

    Args:
        config: of the run.
        num_classes: outputs.
        skip_init: whether the run's network has a SkipInit.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # What conversion warns of (groups with few values) was told when the run began.
        warnings.simplefilter("ignore", UserWarning)
        plain = build_plain(config, num_classes=num_classes)
        for module in plain.modules():
            if not skip_init and is_batch_normalization(module) and isinstance(module.weight, nn.Parameter):
                nn.init.ones_(module.weight)
        return build_converted(config, plain)[0]


def load_trained(path: str | Path, device: str = "cpu") -> Trained:
    """The network of a checkpoint that `batchless train` has written, with the moving average of the weights if there is one.

    Raises:
        ValueError: no such file, damaged, or not of a run; a device that this machine has not.
    """
    require_device(device)
    path = Path(path)
    checkpoint = load_checkpoint(path)
    missing = [key for key in ("model", "config", "classes", "mean", "std") if key not in checkpoint]
    if missing:
        raise ValueError(
            f"{path} was not written by `batchless train` (no {missing[0]!r} in it): give best.pt or last.pt of a run"
        )
    state, plain = checkpoint["model"], checkpoint["config"]
    if not isinstance(plain, Mapping) or not isinstance(state, Mapping):
        raise ValueError(f"{path} is damaged: its configuration or its model is no mapping")
    config = TrainConfig.from_plain(plain, source=path)
    classes = tuple(str(name) for name in checkpoint["classes"])
    statistics = ChannelStatistics(mean=tuple(checkpoint["mean"]), std=tuple(checkpoint["std"]))
    skip_init = any(key.endswith("gain") and getattr(value, "ndim", 1) == 0 for key, value in state.items())
    model = rebuild_converted(config, num_classes=len(classes), skip_init=skip_init)
    load_model_state(model, state, source=path)
    return Trained(model=model.to(device).eval(), config=config, classes=classes, statistics=statistics, path=path)
