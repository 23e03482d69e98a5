"""BCN with one reduction and one pass forward, the same backward; it saves its input and vectors, nothing else.

From the mean M and the deviation s of every sample n and channel c follow the moments that move the estimates, the
batch's statistics, and the statistics of the affinely mapped signal's groups: the signal between BCN's two steps is
never made. That costs some fifty operations on vectors `[N, C]`, more than it saves on a small map, for which there
is a second form: torch's kernels one after another, with the signal between them made again in the backward pass.

Letters: N samples, C channels, G groups of K channels, P positions; `z = (x - M) / s`; m, v the statistics of step 1,
`a = gamma / sqrt(v + eps)`; `mu`, `R` the mean and inverse deviation of `a (x - m) + beta` per sample and group; w, h gain
and bias per group. Then `R (a (x - m) + beta - mu) = offset + slope z` with two vectors, and the output is
`w (offset + slope z) + h`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchless.nn.normalized_samples import NormalizedSamples, normalize_samples
from batchless.nn.precision import in_autocast

_EXACT = (torch.float32, torch.float64)

SMALL = 1 << 17
"""Elements below which calls cost more than passes over memory; the two forms take the same time about there, on one core."""


def can_fuse(input: Tensor, *others: Tensor | None) -> bool:
    """Whether the fused form is there for this input, and for parameters and estimates `others`.

    Not for half precision and autocast, other memory formats than contiguous ones, and empty inputs; nor where a graph is
    captured or transformed (compile, export, torch.func), for which the composed form is written.
    """
    dtype = input.dtype
    return (
        not torch.compiler.is_compiling()
        and dtype in _EXACT
        and input.dim() > 2
        and input.numel() > 0
        and input.is_contiguous()
        and all(other is None or other.dtype == dtype for other in others)
        and not in_autocast(input)
        and not torch._C._are_functorch_transforms_active()
    )


def fused_batch_channel_norm(
    input: Tensor,
    samples: NormalizedSamples,
    statistics: tuple[Tensor, Tensor],
    channel_affine: tuple[Tensor | None, Tensor | None],
    group_affine: tuple[Tensor | None, Tensor | None],
    *,
    num_groups: int,
    eps: float,
    of_batch: bool = False,
) -> Tensor:
    """`w_g (R_ng (a_c (x - m_c) + beta_c - mu_ng)) + h_g`: both steps of BCN.

    Args:
        input: x, contiguous `[N, C, ..]`, see `can_fuse`.
        samples: `normalize_samples(input)`, used up.
        statistics: m and v `[C]`.
        channel_affine: gamma and beta `[C]`; None: 1 and 0.
        group_affine: w and h `[G]`; None: 1 and 0.
        num_groups: G, a divisor of C.
        eps: added to both variances.
        of_batch: whether m and v are the batch's, `samples.batch_statistics()`, and pass gradients on to x; estimates do not.

    Twice differentiable it is not: a second backward raises.
    """
    channels = input.shape[1]
    gamma, beta = _given(channel_affine, channels, input)
    gain, bias = _given(group_affine, num_groups, input)
    output: Tensor
    if of_batch or input.numel() >= SMALL:
        output = _Fused.apply(input, gamma, beta, gain, bias, samples, statistics, eps, of_batch)
    else:
        output = _Small.apply(input, gamma, beta, gain, bias, statistics, eps)
    return output


def fused_again(output: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What computes this output of `fused_batch_channel_norm` again from its input: the same passes over it, to the same bits.

    The vectors are not computed again. Gains and biases are, and statistics may be, those that the call was given, not copies.
    None for a tensor that is no such output, or that needs no gradient.
    """
    return getattr(output.grad_fn, "again", None)


def _given(affine: tuple[Tensor | None, Tensor | None], size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = affine
    return like.new_ones(size) if weight is None else weight, like.new_zeros(size) if bias is None else bias


Backward = Callable[..., tuple[Tensor | None, ...]]


def _differentiable_once(backward: Backward) -> Backward:
    """`once_differentiable`, entered only where a graph of the gradients is asked for.

    Within a network its code is out of the caches: 40 us for each layer, half a percent of a step of ResNet-50 on one image.
    """
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def either(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = (refusing if torch.is_grad_enabled() else backward)(ctx, *gradients)
        return found

    return either


class _Fused(torch.autograd.Function):
    """Vectors are `[N, G, K]`, so that values per group `[G, 1]` and per channel `[G, K]` broadcast without copies."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        gamma: Tensor,
        beta: Tensor,
        gain: Tensor,
        bias: Tensor,
        samples: NormalizedSamples,
        statistics: tuple[Tensor, Tensor],
        eps: float,
        of_batch: bool,
    ) -> Tensor:
        groups = gain.numel()
        grouped = (*samples.mean.shape[:1], groups, -1)
        mean, var = statistics
        statistics_rstd = (var + eps).rsqrt_().view(groups, -1)
        a = gamma.view(groups, -1) * statistics_rstd
        rstd = samples.rstd.view(grouped)
        deviation = (samples.mean - mean).view(grouped)
        # Relative to the group's mean, then in units of its deviation: exact where means are large.
        offset = torch.addcmul(beta.view(groups, -1), a, deviation)
        offset.sub_(offset.mean(2, keepdim=True))
        slope = a / rstd
        inverse = (slope * slope).addcmul_(offset, offset).mean(2, keepdim=True).add_(eps).rsqrt_()  # R
        offset.mul_(inverse)
        slope.mul_(inverse)
        gain = gain.view(groups, 1)
        vectors = slope, offset, gain, bias.view(groups, 1)
        ctx.again = functools.partial(_fused_output, vectors=vectors)
        ctx.of_batch = of_batch
        ctx.save_for_backward(input)
        # Not saved tensors: nobody else has these, and hooks on saved tensors would be called for each.
        ctx.vectors = samples.mean, rstd, deviation, statistics_rstd, a, offset, slope, inverse.mul_(gain)
        # Not view: an activation in place may write over the output, and autograd refuses that for views made in a Function.
        return _over(samples.normalized, *vectors).resize_(input.shape)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        mean, rstd, deviation, statistics_rstd, a, offset, slope, outer = ctx.vectors
        samples, _, width = offset.shape
        rows = (mean.numel(), input.numel() // mean.numel())
        gradient, flat = gradient.contiguous().view(rows), input.view(rows)
        of_ones, of_z = _gradient_sums(gradient, flat, mean, rstd)
        of_ones, of_z = of_ones.view_as(offset), of_z.view_as(offset)
        gain_gradient = (of_ones * offset).addcmul_(of_z, slope).sum(2, keepdim=True)  # of g (offset + slope z)
        bias_gradient = of_ones.sum(2, keepdim=True)
        # With y = a (x - m) + beta: dy = outer (g - (constant + linear z) / (K P)), the latter the projection on the group's
        # mean and normalized values. 1 / (K P) comes in with the last passes: a product with a number is a call more.
        constant = torch.addcmul(bias_gradient, offset, gain_gradient)
        linear = slope * gain_gradient
        beta_gradient = torch.sub(of_ones, constant, alpha=1 / width).mul_(outer)
        # (x - m) = deviation + z / rstd
        gamma_gradient = torch.sub(of_z, linear, alpha=1 / width).mul_(outer).div_(rstd)
        gamma_gradient.addcmul_(beta_gradient, deviation)
        gamma_gradient = _over_samples(gamma_gradient).mul_(statistics_rstd)
        beta_gradient = _over_samples(beta_gradient)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            # dx = on_gradient g - (on_input x + shift) / (K P)
            share = -1 / (width * rows[1])
            on_gradient = outer * a
            on_input = linear.mul_(on_gradient).mul_(rstd)
            shift = constant.mul_(on_gradient)
            if ctx.of_batch:  # gradients that pass through m and v, of which each of the N P values has its part
                through_deviation = (a * gamma_gradient).mul_(statistics_rstd)
                shift.add_(a * beta_gradient, alpha=width / samples)
                shift.addcmul_(through_deviation, deviation, value=width / samples)
                on_input.add_(through_deviation, alpha=width / samples)
            shift.addcmul_(on_input, mean.view_as(shift), value=-1)
            input_gradient = gradient * on_gradient.view(-1, 1)
            input_gradient.addcmul_(flat, on_input.view(-1, 1), value=share).add_(shift.view(-1, 1), alpha=share)
            input_gradient = input_gradient.view_as(input)
        return (
            input_gradient,
            gamma_gradient.view(-1),
            beta_gradient.view(-1),
            _over_samples(gain_gradient).view(-1),
            _over_samples(bias_gradient).view(-1),
            *(None,) * 4,
        )


class _Small(torch.autograd.Function):
    """Batch normalization by m and v, then group normalization; the backward pass makes the signal between them again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        gamma: Tensor,
        beta: Tensor,
        gain: Tensor,
        bias: Tensor,
        statistics: tuple[Tensor, Tensor],
        eps: float,
    ) -> Tensor:
        given = gamma, beta, gain, bias, statistics, eps
        ctx.eps, ctx.again = eps, functools.partial(_small_output, given=given)
        output, mean, rstd = _small(input, given)
        ctx.save_for_backward(input, gamma, beta, gain, mean, rstd, *statistics)
        return output.resize_(input.shape)  # not view: as above

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, gamma, beta, gain, mean, rstd, *statistics = ctx.saved_tensors
        y = _by_statistics(input, gamma, beta, statistics, ctx.eps).view(*mean.shape, -1)
        gradient, gain_gradient, bias_gradient = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous().view(y.shape), y, mean, rstd, gain, *_groups_as_channels(y), [True, True, True]
        )
        input_gradient, gamma_gradient, beta_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient.view(input.shape),
            input,
            gamma,
            *statistics,
            None,
            None,
            False,
            ctx.eps,
            [ctx.needs_input_grad[0], True, True],
        )
        return input_gradient, gamma_gradient, beta_gradient, gain_gradient, bias_gradient, None, None


def _over(z: Tensor, slope: Tensor, offset: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """`gain (offset + slope z) + bias`, in the memory of z."""
    return z.mul_((slope * gain).view(-1, 1)).add_(torch.addcmul(bias, offset, gain).view(-1, 1))


def _fused_output(input: Tensor, vectors: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    return _over(normalize_samples(input).normalized, *vectors).view(input.shape)


def _small(input: Tensor, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The output, in another shape, and means and inverse deviations of its groups."""
    gamma, beta, gain, bias, statistics, eps = given
    y = _by_statistics(input, gamma, beta, statistics, eps).view(input.shape[0], gain.numel(), -1)
    return torch.native_group_norm(y, gain, bias, *_groups_as_channels(y), eps)


def _small_output(input: Tensor, given: tuple[Any, ...]) -> Tensor:
    return _small(input, given)[0].view(input.shape)


def _over_samples(values: Tensor) -> Tensor:
    """The sum, of one sample itself: a sum costs as much as three other small operations."""
    return values if len(values) == 1 else values.sum(0, keepdim=True)


def _by_statistics(input: Tensor, gamma: Tensor, beta: Tensor, statistics: Sequence[Tensor], eps: float) -> Tensor:
    mean, var = statistics
    return torch.native_batch_norm(input, gamma, beta, mean, var, False, 0.0, eps)[0]


def _groups_as_channels(y: Tensor) -> tuple[int, int, int, int]:
    """N, channels, positions and groups for torch's kernel of group normalization, of `y` `[N, G, K P]`: a group is a channel.

    Its own channels lie one after the other, so one gain and bias serve K P positions: neither are to be repeated for each
    channel, nor their gradients to be summed.
    """
    samples, groups, values = y.shape
    return samples, groups, values, groups


def _gradient_sums(gradient: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, a sample's channel: the sums of `gradient` and of `gradient * z` over its positions."""
    count, positions = rows.shape
    _, of_z, of_ones = torch.ops.aten.native_group_norm_backward(
        gradient, rows, mean.view(1, count), rstd.view(1, count), None, 1, count, positions, count, [False, True, True]
    )
    return of_ones, of_z
