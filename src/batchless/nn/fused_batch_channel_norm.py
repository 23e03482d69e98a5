"""Micro-batch BCN with one reduction and one pass forward, the same backward; it saves its input and vectors, nothing else.

From the mean M and the centred mean square V of every sample n and channel c follow both the moments that move the
estimates and the channel statistics of the affinely mapped signal, so the signal between the two steps is never made.

Letters: N samples, C channels, G groups of K channels, P positions; m, v the estimates, `a = gamma / sqrt(v + eps)`,
`b = beta - a m`; `mu`, `R` the mean and inverse deviation of `a x + b` per sample and group; w, h gain and bias per group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_EXACT = (torch.float32, torch.float64)


def can_fuse(input: Tensor, *others: Tensor | None) -> bool:
    """Whether the fused form is there for this input, and for parameters and estimates `others`.

    Not for half precision and autocast, other memory formats than contiguous ones, and empty inputs; nor where a graph is
    captured or transformed (compile, export, torch.func), for which the composed form is written.
    """
    return (
        input.dtype in _EXACT
        and input.dim() > 2
        and input.numel() > 0
        and input.is_contiguous()
        and all(other is None or other.dtype == input.dtype for other in others)
        and not torch.is_autocast_enabled(input.device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


@torch.no_grad()
def sample_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[N, C]` of each sample's channels, of a contiguous input `[N, C, ..]`.

    By the group normalization kernel with N * C groups, three to thirty times as fast on a CPU as `torch.var_mean`, and as
    exact where the mean is large against the deviation. Its normalized output is thrown away.

    >>> mean, var = sample_moments(torch.tensor([[[1.0, 3.0], [5.0, 5.0]]]))
    >>> mean.tolist(), var.tolist()
    ([[2.0, 5.0]], [[1.0, 0.0]])
    """
    samples, channels = input.shape[:2]
    rows = samples * channels
    flat = input.view(1, rows, -1)
    _, mean, rstd = torch.ops.aten.native_group_norm(flat, None, None, 1, rows, flat.shape[2], rows, 0.0)
    return mean.view(samples, channels), rstd.view(samples, channels).pow(
        -2
    )  # a constant's rstd is infinite, its var 0


def fused_batch_channel_norm(
    input: Tensor,
    moments: tuple[Tensor, Tensor],
    estimates: tuple[Tensor, Tensor],
    channel_affine: tuple[Tensor | None, Tensor | None],
    group_affine: tuple[Tensor | None, Tensor | None],
    *,
    num_groups: int,
    eps: float,
) -> Tensor:
    """`w_g R_ng (a_c x + b_c - mu_ng) + h_g`: both steps of micro-batch BCN.

    Args:
        input: x, contiguous `[N, C, ..]`, see `can_fuse`.
        moments: `sample_moments(input)`.
        estimates: m and v `[C]`, which get no gradient.
        channel_affine: gamma and beta `[C]`; None: 1 and 0.
        group_affine: w and h `[G]`; None: 1 and 0.
        num_groups: G, a divisor of C.
        eps: added to both variances.

    Twice differentiable it is not: a second backward raises.
    """
    channels = input.shape[1]
    gamma, beta = _given(channel_affine, channels, input)
    gain, bias = _given(group_affine, num_groups, input)
    output: Tensor = _Fused.apply(input, *moments, *estimates, gamma, beta, gain, bias, eps)
    return output


def _given(affine: tuple[Tensor | None, Tensor | None], size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = affine
    return like.new_ones(size) if weight is None else weight, like.new_zeros(size) if bias is None else bias


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean: Tensor,
        var: Tensor,
        estimated_mean: Tensor,
        estimated_var: Tensor,
        gamma: Tensor,
        beta: Tensor,
        gain: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        samples, channels = mean.shape
        rstd = torch.rsqrt(estimated_var + eps)
        slope = gamma * rstd
        # Both relative to the mean of the sample's channel: exact where that is large.
        level = slope * (mean - estimated_mean) + beta  # the mean of a x + b
        by_group = level.view(samples, len(gain), -1)
        centre = by_group.mean(2, keepdim=True)
        off_centre = (by_group - centre).view(samples, channels)
        spread = (slope.square() * var + off_centre.square()).view_as(by_group).mean(2, keepdim=True)
        inverse = torch.rsqrt(spread + eps)
        outer = _per_channel(gain.view(1, -1, 1) * inverse, channels)
        scale = outer * slope
        mean_output = outer * off_centre + _per_channel(bias.view(1, -1, 1), channels)
        ctx.save_for_backward(input, mean, var, estimated_mean, rstd, gamma, gain, off_centre, inverse)
        return _affine(input, scale, mean_output - scale * mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, estimated_mean, rstd, gamma, gain, off_centre, inverse = ctx.saved_tensors
        samples, channels = mean.shape
        grouped = (samples, len(gain), -1)
        positions = input[0, 0].numel()
        values = positions * (channels // len(gain))  # of one sample and group
        gradient = gradient.contiguous()
        of_ones, of_deviation = _gradient_sums(gradient, input, mean)  # sums over positions of g and of g (x - M)
        slope = gamma * rstd
        outer = _per_channel(gain.view(1, -1, 1) * inverse, channels)  # w R
        inverse = _per_channel(inverse, channels)
        of_normalized = inverse * (slope * of_deviation + off_centre * of_ones)  # of g z, with z = R (a x + b - mu)
        mean_ones = _per_channel(of_ones.view(grouped).sum(2, keepdim=True) / values, channels)
        mean_normalized = _per_channel(of_normalized.view(grouped).sum(2, keepdim=True) / values, channels)
        # d(a x + b) = w R (g - mean g - z mean(g z)); its sums over positions, and those of its product with x - M:
        constant = mean_ones + mean_normalized * inverse * off_centre
        sum_inner = outer * (of_ones - positions * constant)
        sum_inner_deviation = outer * (of_deviation - positions * mean_normalized * inverse * slope * var)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            on_gradient = slope * outer
            on_input = -on_gradient * mean_normalized * inverse * slope
            input_gradient = _affine(input, on_input, -on_gradient * constant - on_input * mean)
            rows = (samples * channels, positions)
            input_gradient.view(rows).addcmul_(gradient.view(rows), on_gradient.view(-1, 1))
        gamma_gradient = (rstd * (sum_inner_deviation + (mean - estimated_mean) * sum_inner)).sum(0)
        gain_gradient = of_normalized.view(grouped).sum((0, 2))
        bias_gradient = of_ones.view(grouped).sum((0, 2))
        nothing = (None, None, None, None)
        return (input_gradient, *nothing, gamma_gradient, sum_inner.sum(0), gain_gradient, bias_gradient, None)


def _per_channel(per_group: Tensor, channels: int) -> Tensor:
    """`[N or 1, G, 1]` as `[N or 1, C]`, each group's value for all of its channels."""
    samples, groups = per_group.shape[:2]
    return per_group.expand(-1, -1, channels // groups).reshape(samples, channels)


def _affine(input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`scale_nc x + shift_nc` in one pass: batch normalization by mean 0 and variance 1, of N * C channels."""
    flat = input.view(1, scale.numel(), -1)
    scale = scale.reshape(-1)
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    found = torch.ops.aten.native_batch_norm(flat, scale, shift.reshape(-1), zeros, ones, False, 0.0, 0.0)
    # Not view: an activation in place may write over the output, and autograd refuses that for views made in a Function.
    output: Tensor = torch.ops.aten._unsafe_view(found[0], input.shape)
    return output


def _gradient_sums(gradient: Tensor, input: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Over the positions of each sample's channel: the sums of `gradient` and of `gradient * (input - mean)`, `[N, C]`."""
    rows = mean.numel()
    flat = input.view(1, rows, -1)
    _, of_deviation, of_ones = torch.ops.aten.native_group_norm_backward(
        gradient.view_as(flat),
        flat,
        mean.view(1, rows),
        torch.ones_like(mean).view(1, rows),
        None,
        1,
        rows,
        flat.shape[2],
        rows,
        [False, True, True],
    )
    return of_ones.view_as(mean), of_deviation.view_as(mean)
