"""Which modules are convolutions, batch normalizations and activations: by type, never by name.

A subclass that keeps torch's `forward` is what its base is. One that overrides it is known by a rule here or left alone.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torchvision.ops.misc import FrozenBatchNorm2d

from batchless.nn.batch_channel_norm import BatchChannelNorm
from batchless.nn.batch_norm import BatchNorm, FrozenBatchNorm
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm
from batchless.nn.reparameterized import Reparameterized
from batchless.nn.same_padding import SamePad

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_TIMM_NORMS = (
    *("EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2", "EvoNorm2dS0", "EvoNorm2dS1", "EvoNorm2dS2"),
    *("FilterResponseNormAct2d", "FilterResponseNormTlu2d", "RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32"),
    *("SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32"),
)
"""timm's normalizations that derive from no class of torch."""

_NOT_ELEMENTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.MultiheadAttention, nn.GLU, nn.Threshold)


def is_normalization(module: nn.Module) -> bool:
    """Whether the module normalizes activations, in any way, ours included."""
    ours = (BatchNorm, FrozenBatchNorm, BatchChannelNorm, EstimatedBatchNorm)
    kinds = (
        _NormBase,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.RMSNorm,
        FrozenBatchNorm2d,
        *ours,
        *_timm("FrozenBatchNormAct2d", *_TIMM_NORMS),
    )
    return isinstance(module, kinds)


def is_batch_normalization(module: nn.Module) -> bool:
    """Whether a normalizer's name means this module: batch normalization of any library, frozen ones included."""
    return isinstance(
        module, (_BatchNorm, FrozenBatchNorm2d, BatchNorm, FrozenBatchNorm, *_timm("FrozenBatchNormAct2d"))
    )


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an elementwise activation of torch or timm."""
    if isinstance(module, _NOT_ELEMENTWISE):
        return False
    return type(module).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")


@dataclass(frozen=True)
class BatchNormSource:
    """What a batch normalization holds, whatever library it comes from.

    `momentum` is None for a cumulative average; `dimensions` are the spatial ones, None where the type does not tell; `drop`
    and `act` run after it in timm's combined layers, None elsewhere.
    """

    num_features: int
    eps: float
    momentum: float | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    dimensions: int | None
    drop: nn.Module | None = None
    act: nn.Module | None = None

    @property
    def device(self) -> torch.device | None:
        """Where the layer's tensors are."""
        known = [t for t in (self.weight, self.running_mean) if t is not None]
        return known[0].device if known else None

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the layer's tensors."""
        known = [t for t in (self.weight, self.running_mean) if t is not None]
        return known[0].dtype if known else None


def read_batch_norm(module: nn.Module) -> BatchNormSource | str:
    """What the batch normalization `module` holds, or why it cannot be replaced."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    with_act = kind in _timm("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
    known = (
        with_act or kind in (FrozenBatchNorm2d, BatchNorm, FrozenBatchNorm) or _keeps_forward(module, _BATCH_NORM_TYPES)
    )
    if not known:
        return f"{kind.__name__} overrides forward and no rule knows it"
    weight, running_mean = getattr(module, "weight", None), getattr(module, "running_mean", None)
    sized = weight if weight is not None else running_mean
    return BatchNormSource(
        num_features=module.num_features if isinstance(module, _BatchNorm) or sized is None else sized.numel(),  # type: ignore[arg-type]
        eps=module.eps,  # type: ignore[arg-type]
        momentum=getattr(module, "momentum", 0.1),
        weight=weight,
        bias=getattr(module, "bias", None),
        running_mean=running_mean,
        running_var=getattr(module, "running_var", None),
        num_batches_tracked=getattr(module, "num_batches_tracked", None),
        dimensions=_spatial_dimensions(module),
        # timm's synchronized form has them only where `convert_sync_batchnorm` made it.
        drop=getattr(module, "drop", nn.Identity()) if with_act else None,
        act=getattr(module, "act", nn.Identity()) if with_act else None,
    )


@dataclass(frozen=True)
class ConvolutionSource:
    """A convolution that can be reparameterized: its plain torch type, and what pads its input where torch does not."""

    plain: type[nn.Module]
    pad_input: nn.Module | None


def read_convolution(module: nn.Module) -> ConvolutionSource | str:
    """What kind of convolution `module` is, or why its weight cannot be reparameterized."""
    if isinstance(module, Reparameterized):
        return "its weight is reparameterized already"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed by a parametrization or a hook"
    if type(module) in _timm("Conv2dSame"):
        assert isinstance(module, nn.Conv2d)
        return ConvolutionSource(nn.Conv2d, SamePad(module.kernel_size, module.stride, module.dilation))
    if type(module) in imported("segmentation_models_pytorch.encoders._efficientnet", "Conv2dStaticSamePadding"):
        return ConvolutionSource(nn.Conv2d, module.static_padding)  # type: ignore[arg-type]
    if type(module) in imported("segmentation_models_pytorch.encoders._efficientnet", "Conv2dDynamicSamePadding"):
        assert isinstance(module, nn.Conv2d)
        return ConvolutionSource(nn.Conv2d, SamePad(module.kernel_size, module.stride, module.dilation))
    for plain in PLAIN_CONVOLUTIONS:
        if isinstance(module, plain):
            if _keeps_forward(module, (plain,)):
                return ConvolutionSource(plain, None)
            return f"{type(module).__name__} overrides forward and no rule knows it"
    return f"{type(module).__name__} is not a convolution"


def convolution_arguments(module: nn.Module) -> dict[str, Any]:
    """What torch's constructor takes to build a convolution of the same shape, a reparameterized one's too."""
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if module.transposed:
        names.append("output_padding")
    return {**{name: getattr(module, name) for name in names}, "bias": module.bias is not None}


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution of torch, transposed and reparameterized ones included."""
    return isinstance(module, _ConvNd)


_BATCH_NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _keeps_forward(module: nn.Module, bases: tuple[type[nn.Module], ...]) -> bool:
    kind = type(module)
    return any(
        isinstance(module, base)
        and kind.forward is base.forward
        and getattr(kind, "_conv_forward", None) is getattr(base, "_conv_forward", None)
        for base in bases
    )


def _spatial_dimensions(module: nn.Module) -> int | None:
    if isinstance(module, nn.BatchNorm1d):
        return 1
    if isinstance(module, nn.BatchNorm3d):
        return 3
    any_rank = (nn.SyncBatchNorm, BatchNorm, FrozenBatchNorm)
    return None if isinstance(module, any_rank) else 2


def _timm(*names: str) -> tuple[type[nn.Module], ...]:
    return imported("timm.layers", *names)


def imported(module: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Classes of a library if it is imported; if it is not, no model can hold one of its layers."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))
