"""Batch normalization with running estimates in place of batch statistics: step 1 of micro-batch BCN.

Letters: N samples, C channels, r rate of one move, k images of a move.
"""

import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.nn.normalized_samples import NormalizedSamples, SampleMoments
from batchless.nn.precision import at_least_float32
from batchless.nn.recomputation import ForwardMemory, recomputing

Update = Literal["step", "forward"]

_MOST_MOMENTS = 4
"""Forwards whose moments wait to be summed together."""

_MANY_POSITIONS = 32
"""Positions from which on the moments of `_MOST_MOMENTS` forwards are at most a quarter of one's input."""


class EstimatedBatchNorm(nn.Module):
    """Normalize each channel by running estimates of its mean and variance, which carry no gradient.

    `y = weight_c * (x - m_c) / sqrt(v_c + eps) + bias_c` with `m = running_mean`, `v = running_var`, starting at 0 and 1. A
    move by rate r is `m <- (1-r) m + r mean(x)`, `v <- (1-r) v + r mean((x - m_old)^2)`; `r = max(1 - (1 - 1/memory)^k, 1/t)`
    for k images and the t-th move (the second part is the warm-up).

    - Inside `batchless.accumulate` with `update="step"`, a forward only reads the estimates and adds to sums; leaving the
      block moves them once, with k the step's images over all ranks.
    - Otherwise a training forward moves the estimates (k = `x.shape[0]`) and normalizes with the moved ones, the authors'
      rule. In eager mode a checkpoint that runs the forward again gets the same estimates and moves nothing; a compiled
      block under a checkpoint needs `batchless.accumulate` for that.
      A move by one value per channel (one image, a 1x1 map) has no warm-up: at r = 1 the value less itself would be left.
    - In evaluation mode: the same formula, nothing moves.

    Args:
        num_features: C.
        eps: added to the variance.
        memory: images after which an old image's weight has fallen to 1/e; the buffer `memory` may be changed in place
            by a schedule (no recompilation) and is restored by `load_state_dict`. `math.inf` averages everything seen; without
            warm-up it gives r = 0, which never moves: a warning.
        update: when the estimates move inside `batchless.accumulate`.
        warmup: whether the first moves average all they have seen.
        affine: whether `weight` and `bias` `[C]` exist.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shapes: `[N, C, ..]` to the same; N may be 0.

    Raises:
        ValueError: memory below 1, eps not above 0, unknown update, or an input without C channels.

    Source: arXiv 1911.09738 section 4 and the authors' EstBN (whose rate buffer is 0 as published, and so never moves).
    """

    running_mean: Tensor
    running_var: Tensor
    moves: Tensor
    memory: Tensor
    step_sums: Tensor | None
    """Inside `batchless.accumulate`: sums of x - m and (x - m)^2 per channel and the count, `[2 C + 1]`; else None.
    What `waiting()` has is not in them yet."""
    used: list[tuple[Tensor, Tensor]] | None
    """A list gets what each forward normalized by, for `batchless.lean` to do it again; None: nobody asks."""
    fixed: tuple[Tensor, Tensor] | None
    """What forwards that are done again normalize by, moving nothing; None otherwise."""

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        memory: float = 200.0,
        update: Update = "step",
        warmup: bool = True,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not memory >= 1:
            raise ValueError(f"memory is a number of images and must be 1 or more, got {memory}")
        if math.isinf(memory) and not warmup:
            warnings.warn("memory=inf gives rate 0: the estimates stay at mean 0, variance 1", stacklevel=2)
        if update not in ("step", "forward"):
            raise ValueError(f"update must be 'step' or 'forward', got {update!r}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.num_features, self.eps, self.update, self.warmup = num_features, eps, update, warmup
        self.step_sums = self.used = self.fixed = None
        self._moments: list[SampleMoments] = []
        self._forwards = ForwardMemory()
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("moves", torch.zeros((), device=device, dtype=torch.long))
        self.register_buffer("memory", torch.full((), memory, device=device, dtype=dtype))

    def reset_estimates(self) -> None:
        """Forget everything seen: mean 0, variance 1, no moves."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.moves.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` `[N, C, ..]` by the estimates."""
        mean, var = self.statistics(input)
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def statistics(self, x: Tensor, samples: NormalizedSamples | None = None) -> tuple[Tensor, Tensor]:
        """The mean and variance `[C]` that this forward normalizes `x` by, moving or collecting as the class says.

        `samples` is `normalize_samples(x)`, if the caller has it.
        """
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected an input [N, {self.num_features}, ..], got {tuple(x.shape)}")
        if self.fixed is not None:
            return self.fixed
        statistics = self._statistics(x, samples)
        if self.used is not None:
            self.used.append(statistics)
        return statistics

    def _statistics(self, x: Tensor, samples: NormalizedSamples | None) -> tuple[Tensor, Tensor]:
        if not self.training or x.numel() == 0:
            return self.running_mean, self.running_var
        again = recomputing()
        if self.step_sums is not None:
            if not again:
                self._collect(x, samples)
            return self.running_mean, self.running_var
        with torch.no_grad():
            if again and (used := self._forwards.recall(x, _fingerprint(x, samples))) is not None:
                return _split_pair(used)
            return self._move(x, samples)

    def start_collecting(self, step_sums: Tensor | None = None) -> None:
        """Let forwards add to `step_sums` (zeros by default) and leave the estimates alone, until `stop_collecting`."""
        self._moments = []
        if step_sums is None:
            dtype = at_least_float32(self.running_mean.dtype)
            step_sums = self.running_mean.new_zeros(2 * self.num_features + 1, dtype=dtype)
        self.step_sums = step_sums

    def stop_collecting(self) -> None:
        """Forget the sums."""
        self._moments, self.step_sums = [], None

    def waiting(self) -> SampleMoments | None:
        """What forwards have left beside `step_sums`, handed over to be added to them; None for nothing."""
        if not self._moments:
            return None
        samples, self._moments = SampleMoments.of_all(self._moments), []
        return samples

    def _collect(self, x: Tensor, samples: NormalizedSamples | None) -> None:
        if samples is None or samples.positions < _MANY_POSITIONS:
            with torch.no_grad():
                self._add(*_about(self.running_mean, x, samples), values=x.numel() // self.num_features)
            return
        # One sum over some forwards of a step, as m does not move in it: a dozen small operations are much to one image.
        if self._moments and (len(self._moments) == _MOST_MOMENTS or self._moments[0].positions != samples.positions):
            self._add_waiting()
        self._moments.append(samples.moments())

    @torch.no_grad()
    def _add_waiting(self) -> None:
        if (samples := self.waiting()) is not None:
            self._add(*samples.moments_about(self.running_mean), values=samples.values)

    def _add(self, shift: Tensor, square: Tensor, *, values: int) -> None:
        assert self.step_sums is not None
        self.step_sums.add_(torch.cat([shift, square, shift.new_ones(1)]), alpha=values)

    def _move(self, x: Tensor, samples: NormalizedSamples | None) -> tuple[Tensor, Tensor]:
        shift, square = _about(self.running_mean, x, samples)
        self.moves.add_(1)
        # One value has no variance: a first move all the way to it would leave 0 of it, whatever it is.
        warm_up = self.warmup and x.numel() > self.num_features
        rate = move_rate(x.shape[0], self.memory, self.moves if warm_up else None)
        self.running_mean.copy_(self.running_mean + rate * shift)
        self.running_var.copy_(torch.lerp(self.running_var.to(square.dtype), square, rate))
        # Copies: the graph of this forward keeps its own values while later forwards move the buffers.
        used = torch.cat([self.running_mean, self.running_var])
        if not torch.compiler.is_compiling():
            self._forwards.remember(x, fingerprint=_fingerprint(x, samples), used=used)
        return _split_pair(used)


def _about(centre: Tensor, x: Tensor, samples: NormalizedSamples | None) -> tuple[Tensor, Tensor]:
    """`centred_moments(x, centre)`, from the moments of the samples if they are there."""
    return centred_moments(x, centre) if samples is None else samples.moments_about(centre)


def centred_moments(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, `mean(x - centre)` and `mean((x - centre)^2)` over all other dimensions, in float32 or wider.

    Args:
        x: `[N, C, ..]`, not empty.
        centre: `[C]`. Taking squares about it, not about 0, keeps them exact where the mean is large.

    >>> shift, square = centred_moments(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0]))
    >>> shift.item(), square.item()
    (1.0, 2.0)
    """
    dimensions = [0, *range(2, x.dim())]
    wide = at_least_float32(centre.dtype)
    deviation = x.to(wide) - centre.to(wide).view(-1, *[1] * (x.dim() - 2))
    shift = deviation.mean(dimensions)
    # Not square().mean(): the norm needs no second temporary of the size of x.
    square = torch.linalg.vector_norm(deviation, dim=dimensions).square() / (x.numel() // x.shape[1])
    return shift, square


def move_rate(images: int | Tensor, memory: Tensor, moves: Tensor | None) -> Tensor:
    """`r = max(1 - (1 - 1/memory)^images, 1/moves)`, the second part only where `moves` is given.

    Shapes: `memory` and `moves` are alike; so is the result.
    """
    # Clamped: with memory 1 the logarithm is infinite, and 0 images times that would be NaN instead of no move.
    log_kept = torch.log1p(-1 / memory.to(at_least_float32(memory.dtype))).clamp_min(-1e30)
    rate = -torch.expm1(images * log_kept)
    return rate if moves is None else torch.maximum(rate, 1 / moves.clamp_min(1).to(rate.dtype))


def _fingerprint(x: Tensor, samples: NormalizedSamples | None) -> Tensor:
    """What tells one forward's input from another's: its channel means, and a corner (an image and its mirror differ there)."""
    corner = x[0]
    while corner.dim() > 1:
        corner = corner.select(1, 0)
    wide = at_least_float32(x.dtype)
    mean = x.mean([0, *range(2, x.dim())], dtype=wide) if samples is None else samples.batch_mean()
    return torch.cat([mean, corner.to(wide)])


def _split_pair(pair: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = pair.chunk(2)
    return mean, var
