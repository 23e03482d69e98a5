"""A layer's forward done again in the backward pass: the same output from the same input, and no state moved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torchvision.ops.misc import FrozenBatchNorm2d

from batchless.nn.batch_channel_norm import BatchChannelNorm
from batchless.nn.batch_norm import BatchNorm, FrozenBatchNorm
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm
from batchless.nn.fused_batch_channel_norm import fused_again
from batchless.nn.precision import in_autocast
from batchless.nn.rebuilding import require_version
from batchless.nn.reparameterized import Reparameterized
from batchless.nn.skip_init import SkipInit
from batchless.nn.standardized import parameters_of
from batchless.surgery.recognize import (
    ConvolutionSource,
    is_activation,
    is_convolution,
    read_batch_norm,
    read_convolution,
)

Run = Callable[[Tensor], Tensor]

Used = tuple[Tensor, Tensor]
"""The mean and variance that an `EstimatedBatchNorm` normalized by."""

_SAME_IN_PLACE = (nn.ReLU6, nn.LeakyReLU)
"""Whose output over their input has the same bits; timm's others compute in another order there. `nn.ReLU` needs no hooks."""

_STATELESS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, FrozenBatchNorm2d, FrozenBatchNorm)


def why_not(module: nn.Module) -> str | None:
    """Why the forward of a normalization, an activation or a convolution cannot be done again; None if it can."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if is_convolution(module):
        source = read_convolution(module)
        return None if isinstance(module, Reparameterized) or isinstance(source, ConvolutionSource) else source
    if is_activation(module):
        return "it is random" if isinstance(module, nn.RReLU) else None
    if isinstance(module, SkipInit | BatchChannelNorm | EstimatedBatchNorm | BatchNorm):
        synchronized = any(getattr(part, "sync", False) for part in module.modules())
        return "its statistics are those of all processes" if synchronized else None
    if isinstance(module, nn.SyncBatchNorm):
        return "its statistics are those of all processes"
    if isinstance(module, _InstanceNorm):
        return "it tracks statistics" if module.track_running_stats else None
    if isinstance(module, _BatchNorm):
        found = read_batch_norm(module)
        if isinstance(found, str):
            return found
        return None if _nothing(found.drop) else "it drops values at random"
    if isinstance(module, _STATELESS):
        timm = kind.__module__.startswith("timm.layers.")
        if not timm and not any(kind.forward is base.forward for base in _STATELESS if isinstance(module, base)):
            return f"{kind.__name__} overrides forward and no rule knows it"
        return None if _nothing(getattr(module, "drop", None)) else "it drops values at random"
    return f"no rule knows {kind.__name__}"


def _nothing(drop: object) -> bool:
    return drop is None or isinstance(drop, nn.Identity)


def estimates_of(module: nn.Module) -> EstimatedBatchNorm | None:
    """The layer whose estimates `module` normalizes by."""
    step = module.batch_norm if isinstance(module, BatchChannelNorm) else module
    return step if isinstance(step, EstimatedBatchNorm) else None


@dataclass(frozen=True)
class ForwardAgain:
    """The forward of one layer as it ran, under the same autocast and in the same mode.

    Raises RuntimeError where a parameter or statistic it needs has been changed in place since.
    """

    run: Run
    needs: tuple[tuple[Tensor, int], ...]
    autocast: torch.dtype | None
    """The type that autocast computed in; None: it was off."""
    run_in_place: Run | None = None
    """The same over its input, where the layer can."""

    def __call__(self, input: Tensor, alone: bool) -> Tensor:
        """The layer's output for `input`, which nobody else wants if `alone`."""
        for tensor, version in self.needs:
            require_version(tensor, version)
        run = self.run_in_place if alone and self.run_in_place is not None else self.run
        if self.autocast is None and not in_autocast(input):
            return run(input)
        with torch.autocast(input.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return run(input)


def forward_again(module: nn.Module, output: Tensor, used: Sequence[Used]) -> ForwardAgain:
    """What has just given `output`, to run again; `used` is what its estimates were used with, if it has any."""
    run, statistics = _run_of(module, output, used)
    needs = (*parameters_of(module.modules() if module._modules else (module,)), *statistics)
    return ForwardAgain(
        run=run,
        needs=tuple((tensor, tensor._version) for tensor in needs),
        autocast=torch.get_autocast_dtype(output.device.type) if in_autocast(output) else None,
        run_in_place=_in_mode(module, training=module.training, inplace=True)
        if type(module) in _SAME_IN_PLACE
        else None,
    )


def _run_of(module: nn.Module, output: Tensor, used: Sequence[Used]) -> tuple[Run, tuple[Tensor, ...]]:
    estimates = estimates_of(module)
    if isinstance(module, BatchChannelNorm) and (again := fused_again(output)) is not None:
        return again, used[-1] if estimates is not None else ()
    if estimates is not None:
        return _with_estimates(module, estimates, used[-1]), used[-1]
    norm = module.batch_norm if isinstance(module, BatchChannelNorm) else module
    if isinstance(norm, _BatchNorm | BatchNorm):
        if norm.training or norm.running_mean is None:
            if norm is module and (kept := _kept_statistics(output, norm)) is not None:
                return _with_kept_statistics(norm, kept), ()
            if isinstance(norm, BatchNorm):
                return _with_own_batch_statistics(module, norm), ()
            return _with_batch_statistics(module, norm), ()
        assert norm.running_var is not None
        return _in_mode(module, training=False), (norm.running_mean, norm.running_var)
    return _in_mode(module, training=module.training), ()


def _kept_statistics(output: Tensor, norm: _BatchNorm | BatchNorm) -> tuple[Tensor, Tensor] | None:
    """The mean and inverse deviation that the processor's kernel keeps for its backward pass, where it has made `output`."""
    node: Any = output.grad_fn
    if node is None or node.name() != "NativeBatchNormBackward0" or not output.is_cpu:
        return None
    mean, rstd = node._saved_result1, node._saved_result2
    found = all(part is None or part.dtype == output.dtype for part in (mean, rstd, norm.weight, norm.bias))
    return (mean, rstd) if found else None


def _with_kept_statistics(norm: _BatchNorm | BatchNorm, statistics: tuple[Tensor, Tensor]) -> Run:
    # One pass: the statistics, which take longer, are there. With variance 1 and eps 0 the kernel multiplies by `scale * 1`, in
    # training by the same product of gain and inverse deviation: the same bits.
    mean, rstd = statistics

    def run(input: Tensor) -> Tensor:
        scale = rstd if norm.weight is None else norm.weight * rstd
        ones = torch.ones_like(rstd)
        return torch.native_batch_norm(input, scale, norm.bias, mean, ones, False, 0.0, 0.0)[0]

    return run


def _with_batch_statistics(module: nn.Module, norm: _BatchNorm) -> Run:
    # Without running statistics there are none to move.
    def run(input: Tensor) -> Tensor:
        normalized = F.batch_norm(input, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        act = getattr(module, "act", None)  # timm's combined layers
        output: Tensor = normalized if act is None else act(normalized)
        return output

    return run


def _with_own_batch_statistics(module: nn.Module, norm: BatchNorm) -> Run:
    # The same forward, so that it takes the same kernels; what it tracks goes into copies.
    def run(input: Tensor) -> Tensor:
        before, buffers = norm.training, dict(norm.named_buffers())
        norm.training = True
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
        try:
            output: Tensor = module.forward(input)
        finally:
            norm.training = before
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
        return output

    return run


def _with_estimates(module: nn.Module, estimates: EstimatedBatchNorm, statistics: tuple[Tensor, Tensor]) -> Run:
    def run(input: Tensor) -> Tensor:
        estimates.fixed = statistics
        try:
            output: Tensor = module.forward(input)
        finally:
            estimates.fixed = None
        return output

    return run


def _in_mode(module: nn.Module, *, training: bool, inplace: bool = False) -> Run:
    def run(input: Tensor) -> Tensor:
        state: Any = module
        before, was_inplace = module.training, getattr(module, "inplace", None)
        state.training = training
        if was_inplace is not None:
            state.inplace = inplace
        try:
            output: Tensor = module.forward(input)
        finally:
            state.training = before
            if was_inplace is not None:
                state.inplace = was_inplace
        return output

    return run
