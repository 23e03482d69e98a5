"""A trained network from its checkpoint alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from batchless.data import ChannelStatistics
from batchless.models import build_model
from batchless.runs import load_checkpoint, load_model_state
from batchless.surgery import ConversionReport, convert
from batchless.tasks.config import TrainConfig


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


def build_converted(config: TrainConfig, model: nn.Module) -> tuple[nn.Module, ConversionReport]:
    """`model` with the run's normalizer, its pairs found by an example of the run's image size."""
    size = config.data.image_size
    return convert(model, config.normalizer, example=torch.zeros(2, 3, size, size))


def load_trained(path: str | Path, device: str = "cpu") -> Trained:
    """The network of a checkpoint that `batchless train` has written, with the moving average of the weights if there is one.

    Raises:
        ValueError: no such file, damaged, or not of a run.
    """
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
    model, _ = build_converted(config, build_model(config.model, num_classes=len(classes)))
    load_model_state(model, state, source=path)
    return Trained(model=model.to(device).eval(), config=config, classes=classes, statistics=statistics, path=path)
