"""A trained network as plain torch layers, and the file that holds it without its training."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchless.data import ChannelStatistics
from batchless.deploy.about import About
from batchless.models.example import is_detector
from batchless.models.temporal_shift import SegmentNetwork
from batchless.models.video import is_3d
from batchless.nn import SkipInit
from batchless.runs import load_checkpoint, load_model_state
from batchless.surgery import fold
from batchless.surgery.recognize import is_convolution, read_convolution
from batchless.tasks import TrainConfig, Trained
from batchless.tasks.trained import example_input, rebuild_converted

_KIND = "folded network of batchless"

_NETWORK = ("task", "model", "normalizer", "detector", "segment", "video")
"""Settings of a run that its network is built from, and `data.image_size`."""


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A network of plain torch layers on the CPU, in evaluation mode, and what to know of it."""

    model: nn.Module
    about: About
    path: Path


def folded_plain(model: nn.Module, example: object) -> nn.Module:
    """`batchless.fold`, which must leave no layer of this package and no convolution that computes its weight.

    Raises:
        ValueError: naming the first layer that is left.
    """
    folded = fold(model, example)
    for name, module in folded.named_modules():
        kind = type(module)
        if kind.__module__.startswith(("batchless.nn.", "batchless.surgery.")):
            raise ValueError(f"cannot export: {name} ({kind.__name__}) has no counterpart among torch's layers")
        if is_convolution(module) and isinstance(reason := read_convolution(module), str):
            raise ValueError(
                f"cannot export: {name} is no plain convolution ({reason}): choose an architecture whose weights are plain"
            )
    return folded


def with_normalization(model: nn.Module, statistics: ChannelStatistics) -> nn.Module:
    """`model` after `(image - mean) / std`, which a layer of torch's does, for images or clips scaled to [0, 1]."""
    if isinstance(model, SegmentNetwork):
        return SegmentNetwork(with_normalization(model.base_model, statistics), segments=model.segments).eval()
    layer = (nn.BatchNorm3d if is_3d(model) else nn.BatchNorm2d)(3, eps=0.0, affine=False)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(torch.tensor(statistics.mean))
    layer.running_var.copy_(torch.tensor(statistics.std, dtype=torch.float64).square())
    return nn.Sequential(layer, model).eval()


def folded_bytes(model: nn.Module, about: About, trained: Trained) -> bytes:
    """The content of the file that `load_folded` reads: tensors and plain values. `model` is that of `trained`, folded."""
    buffer = io.BytesIO()
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(about).items()}
    config = trained.config.plain()
    network = {name: config[name] for name in _NETWORK} | {"data": {"image_size": config["data"]["image_size"]}}
    content: dict[str, Any] = {"kind": _KIND, "model": dict(model.state_dict()), "about": plain, "network": network}
    # Conversion makes one of a gain that is zero, which gains of pretrained weights are not; it folds to other layers.
    content["skip_init"] = any(isinstance(module, SkipInit) for module in trained.model.modules())
    torch.save(content, buffer)
    return buffer.getvalue()


def load_folded(path: str | Path) -> Folded:
    """The network in a file that `batchless export --format torch` has written.

    The file holds a state dict under the architecture's own keys (without those of layers that were folded away) and plain
    values, and is read with `weights_only=True`, so it runs no code. The layers themselves are built from the
    architecture's name: batchless must be installed, and the library that the architecture is from. The formats
    `exported_program` and `onnx` need neither.

    Raises:
        ValueError: no such file, damaged, another kind of file, or an architecture that is built differently here.
    """
    path = Path(path)
    return _read(load_checkpoint(path), path)


def run_folded(content: bytes) -> nn.Module:
    """The network in the content of such a file."""
    return _read(torch.load(io.BytesIO(content), weights_only=True), Path("the exported file")).model


def _read(content: Mapping[str, Any], path: Path) -> Folded:
    if content.get("kind") != _KIND:
        fix = "load_trained reads it" if "config" in content else "`batchless export CKPT --format torch` writes one"
        raise ValueError(f"{path} is no folded network: {fix}")
    try:
        about = _about(content["about"])
        config = TrainConfig.from_plain(content["network"], source=path)
        model = _skeleton(config, about, skip_init=bool(content["skip_init"]))
        load_model_state(model, content["model"], source=path)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): export it again") from error
    return Folded(model=model, about=about, path=path)


def _about(plain: Mapping[str, Any]) -> About:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return About(**values)


def _skeleton(config: TrainConfig, about: About, *, skip_init: bool) -> nn.Module:
    """The folded network with random weights: which layers it has depends on no values but the gains that are zero."""
    model = rebuild_converted(config, num_classes=len(about.classes), skip_init=skip_init).eval()
    folded = folded_plain(model, example_input(config, model))
    included = about.normalization_included and not is_detector(model)  # which normalize images themselves
    return with_normalization(folded, about.statistics) if included else folded
