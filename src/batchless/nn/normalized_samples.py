"""An input normalized per sample and channel, and its moments, by one fused kernel: what fused BCN starts from.

Letters: N samples, C channels, P positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NOTHING = 1e-30
"""Added to the variance: a channel of one value gives 0, and any other variance is itself to all digits."""


@dataclass(frozen=True, eq=False)
class NormalizedSamples:
    """`z = (x - mean) * rstd` of an input x `[N, C, ..]`, per sample and channel.

    Attributes:
        normalized: z, `[1, N C, P]`; fused BCN writes its output over it.
        mean: `[N, C]`.
        rstd: inverse deviation `[N, C]`; 1e15 for a channel of one value.
    """

    normalized: Tensor
    mean: Tensor
    rstd: Tensor

    def var(self) -> Tensor:
        """The biased variance `[N, C]`, a new tensor."""
        return self.rstd.pow(-2)

    def batch_mean(self) -> Tensor:
        """The mean `[C]` over samples and positions."""
        return _mean_over_samples(self.mean)

    def moments_about(self, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Per channel, the means of `x - centre` and of `(x - centre)^2` over samples and positions; `centre` is `[C]`."""
        shift = self.mean - centre
        square = self.var().addcmul_(shift, shift)
        return _mean_over_samples(shift), _mean_over_samples(square)

    def batch_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance `[C]` over samples and positions."""
        mean = self.batch_mean()
        return mean, self.moments_about(mean)[1]


def _mean_over_samples(values: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else values.mean(0)  # a mean costs as much as three other small operations


@torch.no_grad()
def normalize_samples(input: Tensor) -> NormalizedSamples:
    """`NormalizedSamples` of a contiguous input `[N, C, ..]`.

    By the group normalization kernel with N * C groups, three to thirty times as fast on a CPU as `torch.var_mean`, and as
    exact where the mean is large against the deviation.

    >>> found = normalize_samples(torch.tensor([[[1.0, 3.0], [5.0, 5.0]]]))
    >>> found.mean.tolist(), found.var().round(decimals=6).tolist()
    ([[2.0, 5.0]], [[1.0, 0.0]])
    """
    samples, channels = input.shape[:2]
    rows = samples * channels
    flat = input.detach().view(1, rows, -1)
    z, mean, rstd = torch.ops.aten.native_group_norm(flat, None, None, 1, rows, flat.shape[2], rows, _NOTHING)
    return NormalizedSamples(z, mean.view(samples, channels), rstd.view(samples, channels))
