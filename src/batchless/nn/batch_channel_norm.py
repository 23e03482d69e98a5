"""Batch-Channel Normalization (Qiao et al., arXiv 1911.09738 and 1903.10520v2).

Letters: N samples, C channels, G groups, m_c and v_c the statistics of step 1.
"""

import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.nn.batch_norm import BatchNorm
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm, Update
from batchless.nn.fused_batch_channel_norm import SMALL, can_fuse, fused_batch_channel_norm
from batchless.nn.group_count import group_count, values_per_group
from batchless.nn.normalized_samples import normalize_samples

_FEW_VALUES = 8
"""Statistics of fewer values than this are mostly noise: a warning."""


def channel_norm(y: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Group normalization with one gain and bias per group: step 2 of BCN.

    `out = weight_g * (y - mu_ng) / sqrt(var_ng + eps) + bias_g`, `mu`, `var` (biased) per sample n and group g.

    Args:
        y: `[N, C, ..]`.
        num_groups: G, a divisor of C.
        weight: `[G]`, or None for 1.
        bias: `[G]`, or None for 0.
        eps: added to the variance.

    Raises:
        ValueError: a group of one value (its normalized value would be 0 whatever the input), or G no divisor of C.
    """
    require_values_in_groups(y, num_groups)
    # Repeated per channel for the fused kernel; the authors' own reshape mixes channels where G does not divide C.
    channels = y.shape[1]
    repeat = channels // num_groups
    return F.group_norm(
        y,
        num_groups,
        None if weight is None else weight.repeat_interleave(repeat, output_size=channels),
        None if bias is None else bias.repeat_interleave(repeat, output_size=channels),
        eps,
    )


def require_values_in_groups(y: Tensor, num_groups: int) -> None:
    """Raise ValueError for groups of one value, or that do not divide the channels; warn of groups of few values."""
    channels = y.shape[1]
    if channels % num_groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide the {channels} channels; group_count() finds a divisor"
        )
    values = values_per_group(channels, num_groups, math.prod(y.shape[2:]))
    if values == 1:
        raise ValueError(
            f"channel normalization of {tuple(y.shape)} in {num_groups} groups has one value per group and would be 0: "
            f"use fewer groups, such as groups={max(1, num_groups // 8)}"
        )
    if values < _FEW_VALUES and not torch.compiler.is_compiling():
        warnings.warn(
            f"channel normalization of {tuple(y.shape)} in {num_groups} groups has only {values} values per group; "
            "fewer groups give steadier statistics",
            stacklevel=4,
        )


class BatchChannelNorm(nn.Module):
    """Normalize each channel over the batch, then each group of channels over the sample.

    Step 1: `y = gamma_c * (x - m_c) / sqrt(v_c + eps) + beta_c`; step 2: `channel_norm(y)`. `statistics` says whose
    `m_c`, `v_c`: `"estimate"` (micro-batch BCN) running estimates, the submodule `batch_norm` is an
    `EstimatedBatchNorm`; `"batch"` (large-batch BCN) the batch's, `batch_norm` is a `BatchNorm`.

    Args:
        num_features: C.
        num_groups: G; by default `group_count(C)`: 32, fewer on narrow layers.
        statistics: `"estimate"` or `"batch"`.
        eps: of both steps.
        memory: of the estimates, in images; see `EstimatedBatchNorm`.
        update: when the estimates move; see `EstimatedBatchNorm`.
        warmup: of the estimates; see `EstimatedBatchNorm`.
        momentum: of the running statistics with `"batch"`.
        sync: with `"batch"`, whether statistics are over all processes.
        affine: whether gamma, beta `[C]` (in `batch_norm`) and the per-group `weight`, `bias` `[G]` exist.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shapes: `[N, C, ..]` to the same.

    Raises:
        ValueError: G no divisor of C; one value per group; with `"batch"`, one value per channel in training.

    >>> layer = BatchChannelNorm(64)
    >>> layer.num_groups, layer(torch.randn(1, 64, 8, 8)).shape
    (32, torch.Size([1, 64, 8, 8]))
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
        *,
        statistics: Literal["estimate", "batch"] = "estimate",
        eps: float = 1e-5,
        memory: float = 200.0,
        update: Update = "step",
        warmup: bool = True,
        momentum: float = 0.1,
        sync: bool = False,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = group_count(num_features) if num_groups is None else num_groups
        if groups < 1 or num_features % groups:
            raise ValueError(
                f"num_groups={groups} does not divide num_features={num_features}: leave it out for {group_count(num_features)}"
            )
        self.num_features, self.num_groups, self.eps = num_features, groups, eps
        self.batch_norm: EstimatedBatchNorm | BatchNorm
        if statistics == "estimate":
            self.batch_norm = EstimatedBatchNorm(
                num_features,
                eps=eps,
                memory=memory,
                update=update,
                warmup=warmup,
                affine=affine,
                device=device,
                dtype=dtype,
            )
        elif statistics == "batch":
            self.batch_norm = BatchNorm(
                num_features, eps=eps, momentum=momentum, sync=sync, affine=affine, device=device, dtype=dtype
            )
        else:
            raise ValueError(f"statistics must be 'estimate' or 'batch', got {statistics!r}")
        self.weight = nn.Parameter(torch.ones(groups, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(groups, device=device, dtype=dtype)) if affine else None

    def forward(self, input: Tensor) -> Tensor:
        """Both steps on `input` `[N, C, ..]`."""
        step = self.batch_norm
        affine = (step.weight, step.bias, self.weight, self.bias)
        # First of all whether a graph is being captured: a comparison of sizes would become part of it.
        if (
            can_fuse(input, step.running_mean, step.running_var, *affine)
            and step.eps == self.eps
            and _is_bare(step)
            and not _is_composed(step, input)
        ):
            return self._fused(input, step)
        return channel_norm(step(input), self.num_groups, self.weight, self.bias, self.eps)

    def _fused(self, input: Tensor, step: EstimatedBatchNorm | BatchNorm) -> Tensor:
        if input.shape[1] != self.num_features:
            raise ValueError(f"expected an input [N, {self.num_features}, ..], got {tuple(input.shape)}")
        require_values_in_groups(input, self.num_groups)
        samples = normalize_samples(input)
        return fused_batch_channel_norm(
            input,
            samples,
            step.statistics(input, samples),
            (step.weight, step.bias),
            (self.weight, self.bias),
            num_groups=self.num_groups,
            eps=self.eps,
            of_batch=step.training and isinstance(step, BatchNorm),
        )


def _is_composed(step: EstimatedBatchNorm | BatchNorm, input: Tensor) -> bool:
    """Whether torch's own two kernels do better: for batch statistics of few values they are quicker and save less."""
    return isinstance(step, BatchNorm) and (step.synchronizes() or input.numel() < SMALL)


def _is_bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its forward: nobody has hooked it."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
