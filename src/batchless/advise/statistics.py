"""Which values a normalization's statistics are of, and how many."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from batchless.nn.batch_channel_norm import BatchChannelNorm
from batchless.nn.batch_norm import BatchNorm, FrozenBatchNorm
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm

Over = Literal["batch", "instance", "group", "sample", "estimates", "constants", "nothing"]
"""What one statistic is of: a channel in all images of the forward (`batch`), in one of them (`instance`), a group of
channels in one image (`group`), the features of one image or position (`sample`), all images so far (`estimates`); or
there is none: `constants` normalize, or `nothing` does."""


@dataclass(frozen=True)
class Statistic:
    """What a statistic is of, and of how many `values`; 0 where it is of none of the input's."""

    over: Over
    values: int


def statistics_over(module: nn.Module, *, training: bool) -> Over:
    """What the statistics of the normalization `module` are of in a forward in training mode, or in evaluation mode."""
    evo_batch = _timm("EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2")
    evo_group = _timm("EvoNorm2dS0", "EvoNorm2dS1", "EvoNorm2dS2")
    if isinstance(module, (*evo_batch, *evo_group)) and not module.apply_act:
        return "nothing"  # timm's EvoNorm is normalization and activation in one; without the latter neither is left
    if isinstance(module, (FrozenBatchNorm2d, FrozenBatchNorm, *_timm("FrozenBatchNormAct2d"))):
        return "constants"
    if isinstance(module, EstimatedBatchNorm):
        return "estimates"
    if isinstance(module, (_BatchNorm, BatchNorm, *evo_batch)):
        return "batch" if training or getattr(module, "running_var", None) is None else "constants"
    if isinstance(module, _InstanceNorm):
        return "instance" if training or module.running_mean is None else "constants"
    if isinstance(module, _timm("FilterResponseNormAct2d", "FilterResponseNormTlu2d")):
        return "instance"
    return "group" if isinstance(module, (nn.GroupNorm, BatchChannelNorm, *evo_group)) else "sample"


def statistic_of(module: nn.Module, shape: tuple[int, ...], *, training: bool) -> Statistic:
    """What one statistic of the normalization `module` is of when its input has `shape`.

    >>> statistic_of(nn.BatchNorm2d(8), (2, 8, 1, 1), training=True)
    Statistic(over='batch', values=2)
    >>> statistic_of(nn.GroupNorm(4, 8), (2, 8, 3, 3), training=True)
    Statistic(over='group', values=18)
    """
    over = statistics_over(module, training=training)
    layer: Any = module
    match over:
        case "batch":
            return Statistic(over, math.prod(shape) // shape[1])
        case "instance":
            unbatched = isinstance(module, _InstanceNorm) and len(shape) == module._get_no_batch_dim()  # type: ignore[no-untyped-call]
            return Statistic(over, math.prod(shape[1 if unbatched else 2 :]))
        case "group":
            groups = getattr(layer, "num_groups", None) or layer.groups  # timm's EvoNorm says groups
            return Statistic(over, shape[1] // groups * math.prod(shape[2:]))
        case "sample":
            # RMSNorm and LayerNorm of torch and timm; another kind is taken to normalize over the last dimension.
            return Statistic(over, math.prod(getattr(layer, "normalized_shape", shape[-1:])))
        case _:
            return Statistic(over, 0)


def _timm(*names: str) -> tuple[type[nn.Module], ...]:
    """Classes of timm's layers if it is imported; if it is not, no model can hold one."""
    loaded = sys.modules.get("timm.layers")
    return tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))
