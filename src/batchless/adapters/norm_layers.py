"""A normalizer's name as the `norm_layer` argument of torchvision's and timm's model builders."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchless.nn.normalizer import NoNorm, Normalizer, parse_normalizer
from batchless.surgery.recognize import BatchNormSource, read_batch_norm
from batchless.surgery.replace import build_norm


def norm_layer(name: str, *, eps: float = 1e-5, momentum: float = 0.1) -> "functools.partial[nn.Module]":
    """A function `norm_layer(channels)` that builds the normalization `name`, in place of `nn.BatchNorm2d`.

    The model is the one that `batchless.convert(plain model, name)` gives. Builders that set the last gain of a residual
    branch to zero (`zero_init_residual`, `zero_init_last`) set BCN's per-group gain, which is where `convert` moves the zero.

    Args:
        name: the normalization alone, such as `gn(groups=16)` or `bcn-micro`.
        eps: of the BatchNorm that is replaced; 1e-3 in torchvision's MobileNetV3, EfficientNetV2 and EfficientNet-B5 to B7.
        momentum: of the BatchNorm that is replaced.

    Raises:
        ValueError: unknown name, one with a weight part, or `none`; when called by a builder (many of timm's) that wants one
            layer for normalization and activation together.

    >>> import torchvision
    >>> model = torchvision.models.resnet18(norm_layer=norm_layer("gn"))
    >>> type(model.bn1).__name__, model.bn1.num_groups
    ('GroupNorm', 32)
    """
    normalizer = parse_normalizer(name)
    if normalizer.weight is not None:
        raise ValueError(
            f"norm_layer({name!r}): a norm_layer cannot replace the convolutions that +{normalizer.weight.name} is about: "
            f"build the model without norm_layer and use batchless.convert(model, {name!r})"
        )
    if isinstance(normalizer.act, NoNorm):
        raise ValueError(
            f"norm_layer({name!r}): a norm_layer cannot give the convolutions the biases that a model without normalization "
            "needs: build the model without norm_layer and use batchless.convert(model, 'none+sws')"
        )
    # A partial of an object that is no function: timm takes any partial, but it calls a plain function also where the
    # layer must hold the activation, and the activation would be missing from the model without a word.
    return functools.partial(_NormLayer(normalizer), eps=eps, momentum=momentum)


@dataclass(frozen=True)
class _NormLayer:
    normalizer: Normalizer

    def __call__(
        self,
        num_features: int,
        *,
        eps: float,
        momentum: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> nn.Module:
        if more:
            raise self._refusal(f" (it passes {', '.join(more)})")
        plain = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype)
        source = read_batch_norm(plain)
        assert isinstance(source, BatchNormSource)
        place = f"norm_layer({num_features})"
        return build_norm(self.normalizer.act, source, statistics_hold=True, rank=None, spatial=None, name=place).layer

    @property
    def __name__(self) -> str:
        # timm asks for the name only where it looks for the layer that holds the activation too.
        raise self._refusal("")

    def _refusal(self, detail: str) -> ValueError:
        name = str(self.normalizer)
        return ValueError(
            f"norm_layer({name!r}): this model's builder wants one layer for normalization and activation together, and a "
            f"norm_layer does not learn which activation{detail}: build the model without norm_layer and use "
            f"batchless.convert(model, {name!r})"
        )
