"""The contestants: how others compute what batchless computes, written from the published descriptions.

The authors' formulas repeat the order of operations of their published modules, since that is what costs time; the
equations are those of arXiv 1903.10520 and 1911.09738. timm's layer is timm's own.
Letters: N samples, C channels, G groups, O output channels, r rate.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Conv2d)


def authors_standardized(weight: Tensor) -> Tensor:
    """The authors' weight standardization of `[O, inputs/groups, K, K]`.

    Three means one after another, the unbiased deviation of what is left, eps = 1e-5 added to it, a division.
    """
    mean = weight
    for dimension in (1, 2, 3):
        mean = mean.mean(dim=dimension, keepdim=True)
    centred = weight - mean
    deviation = centred.flatten(1).std(dim=1) + 1e-5
    return centred / deviation.reshape(-1, 1, 1, 1)


def timm_standardized(weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The weight that timm's `StdConv2d` convolves with: batch normalization of one "sample" whose channels are the rows."""
    rows = weight.reshape(1, weight.shape[0], -1)
    standardized: Tensor = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=eps)
    return standardized.reshape_as(weight)


class AuthorsConv2d(nn.Conv2d):
    """A convolution that standardizes its weight by the authors' formula in every forward."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[N, C, H, W]`."""
        output: Tensor = self._conv_forward(input, authors_standardized(self.weight), self.bias)
        return output


class AuthorsEstimatedBatchNorm(nn.Module):
    """The authors' normalization by estimates: their EstBN, of `[N, C, H, W]`.

    A training forward moves the estimates by rate r to the mean of the input and to its mean square about the old
    estimate, without gradient, then normalizes by the moved ones. r is read from a buffer with `.item()`; as published
    it is 0 and nothing moves, `rate` sets it.
    """

    running_mean: Tensor
    running_var: Tensor
    rate: Tensor

    def __init__(self, channels: int, *, rate: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("rate", torch.full((1,), rate))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[N, C, H, W]`."""
        rate = self.rate.item()
        if self.training:
            with torch.no_grad():
                self._move(x, rate)
        per_channel = (1, -1, 1, 1)
        centred = x - self.running_mean.view(per_channel)
        normalized = centred / torch.sqrt(self.running_var + 1e-5).view(per_channel)
        return self.weight.view(per_channel) * normalized + self.bias.view(per_channel)

    def _move(self, x: Tensor, rate: float) -> None:
        by_channel = x.transpose(0, 1).contiguous().view(x.shape[1], -1)
        mean = by_channel.mean(dim=1)
        deviation = by_channel - self.running_mean.view(-1, 1)
        square = (deviation * deviation).mean(dim=1)
        self.running_mean.mul_(1 - rate).add_(rate * mean)
        self.running_var.mul_(1 - rate).add_(rate * square)


class AuthorsBatchChannelNorm(nn.Module):
    """The authors' micro-batch BCN: estimated batch normalization, then channel normalization of `[N, C, H, W]`.

    The second step is a batch normalization of the input seen as `[1, N G, values]`, with one gain and bias per group.
    """

    def __init__(self, channels: int, groups: int = 32, *, rate: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.batch_norm = AuthorsEstimatedBatchNorm(channels, rate=rate)
        self.weight = nn.Parameter(torch.ones(1, groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Both steps."""
        samples = x.shape[0]
        rows = self.batch_norm(x).view(1, samples * self.groups, -1)
        normalized = torch.batch_norm(rows, None, None, None, None, True, 0.0, self.eps, True)
        grouped = self.weight * normalized.view(samples, self.groups, -1) + self.bias
        return grouped.view_as(x)


def authors_conv(conv: nn.Conv2d) -> AuthorsConv2d:
    """`conv` with its weight standardized by the authors' formula; the same parameters."""
    return _with_parameters_of(conv, AuthorsConv2d(*_sizes(conv), **_settings(conv)))


def timm_conv(conv: nn.Conv2d) -> StdConv2d:
    """`conv` as timm's `StdConv2d`; the same parameters."""
    return _with_parameters_of(conv, StdConv2d(*_sizes(conv), **_settings(conv)))


def _sizes(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.in_channels, conv.out_channels, conv.kernel_size


def _settings(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
    }


def _with_parameters_of(conv: nn.Conv2d, layer: Layer) -> Layer:
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer


def with_layers(model: nn.Module, rules: dict[type[nn.Module], Callable[[Any], nn.Module]]) -> nn.Module:
    """A copy of `model` in which every layer of a type in `rules` (exactly) is what its rule makes of it."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if name and type(layer) in rules:
            model.set_submodule(name, rules[type(layer)](layer))
    return model
