"""A trained network as plain torch layers, and the file that holds it without its training."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchless.data import ChannelStatistics
from batchless.nn import SkipInit
from batchless.runs import load_checkpoint, load_model_state
from batchless.surgery import fold
from batchless.surgery.recognize import is_convolution, read_convolution
from batchless.tasks import DataSettings, TrainConfig, Trained
from batchless.tasks.trained import rebuild_converted

_KIND = "folded network of batchless"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a user of an exported network must know; every format holds it.

    The input is an image with its shorter side resized to `resize_shorter_side`, the central square of it, scaled to
    [0, 1], and, unless `normalization_included`, normalized: `(image - mean) / std` per channel, red first.

    Attributes:
        model: name of the architecture.
        normalizer: what the network was trained with before it was folded.
        classes: names of the outputs, in order.
        mean: of the channels.
        std: of the channels.
        image_size: S of the input `[N, 3, S, S]`.
        resize_shorter_side: in pixels.
        normalization_included: whether the network normalizes its input itself.
    """

    model: str
    normalizer: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize_shorter_side: int
    normalization_included: bool

    @property
    def statistics(self) -> ChannelStatistics:
        """Mean and standard deviation by which images are normalized."""
        (r, g, b), (dr, dg, db) = self.mean, self.std
        return ChannelStatistics(mean=(r, g, b), std=(dr, dg, db))


def about(trained: Trained, *, normalization_included: bool) -> About:
    """What a user of the network must know."""
    data, plain = trained.config.data, trained.config.plain()
    return About(
        model=trained.config.model,
        normalizer=plain["normalizer"],
        classes=trained.classes,
        mean=tuple(trained.statistics.mean),
        std=tuple(trained.statistics.std),
        image_size=data.image_size,
        resize_shorter_side=data.resize_shorter_side or data.image_size,
        normalization_included=normalization_included,
    )


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A network of plain torch layers on the CPU, in evaluation mode, and what to know of it."""

    model: nn.Module
    about: About
    path: Path


def folded_plain(model: nn.Module, example: Tensor) -> nn.Module:
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


def with_normalization(model: nn.Module, statistics: ChannelStatistics) -> nn.Sequential:
    """`model` after `(image - mean) / std`, which a layer of torch's does, for images scaled to [0, 1]."""
    layer = nn.BatchNorm2d(3, eps=0.0, affine=False)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(torch.tensor(statistics.mean))
    layer.running_var.copy_(torch.tensor(statistics.std, dtype=torch.float64).square())
    return nn.Sequential(layer, model).eval()


def folded_bytes(model: nn.Module, about: About, *, trained: nn.Module) -> bytes:
    """The content of the file that `load_folded` reads: tensors and plain values. `model` is `trained`, folded."""
    buffer = io.BytesIO()
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(about).items()}
    content: dict[str, Any] = {"kind": _KIND, "model": dict(model.state_dict()), "about": plain}
    # Conversion makes one of a gain that is zero, which gains of pretrained weights are not; it folds to other layers.
    content["skip_init"] = any(isinstance(module, SkipInit) for module in trained.modules())
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
        model = _skeleton(about, skip_init=bool(content["skip_init"]))
        load_model_state(model, content["model"], source=path)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): export it again") from error
    return Folded(model=model, about=about, path=path)


def _about(plain: Mapping[str, Any]) -> About:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return About(**values)


def _skeleton(about: About, *, skip_init: bool) -> nn.Module:
    """The folded network with random weights: which layers it has depends on no values but the gains that are zero."""
    config = TrainConfig(model=about.model, normalizer=about.normalizer, data=DataSettings(image_size=about.image_size))
    model = rebuild_converted(config, num_classes=len(about.classes), skip_init=skip_init).eval()
    folded = folded_plain(model, torch.zeros(2, 3, about.image_size, about.image_size))
    return with_normalization(folded, about.statistics) if about.normalization_included else folded
