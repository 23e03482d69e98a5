"""Residual branches without normalization: NF-ResNets' alpha and beta, for blocks with an activation after the sum."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RELU_VARIANCE = 0.5 - 0.5 / math.pi
"""Of relu(z), z ~ N(0, 1)."""

_CELLS_PER_ALPHA, _CELLS_PER_UNIT, _DEVIATIONS = 16, 64, 8.0


def branch_betas(transitions: Sequence[bool], *, alpha: float) -> list[float]:
    """The beta of each block of a residual network, by which its input is divided, in order.

    A block computes `relu(x + alpha * f(x / beta))`; a transition block, whose shortcut is a convolution g,
    `relu(g(x / beta) + alpha * f(x / beta))`. f and g have zero-mean weights, scaled so that from relu(z), z ~ N(0, 1), they
    make values of variance 1; so `beta^2 = Var[x] / Var[relu(z)]`. Var[x] follows from block to block as the authors' does,
    but with the activation after the sum: x is relu(z) at first, relu(x + alpha * z) with a new z after a block, and
    relu(sqrt(1 + alpha^2) * z) after a transition block. (Without the activation Var[x] would grow by alpha^2 per block.)

    Args:
        transitions: for each block, whether its shortcut is a convolution.
        alpha: the weight of the branches, above 0.

    Raises:
        ValueError: alpha is not positive and finite.

    Source: Brock et al., arXiv 2101.08692, section 3, for blocks whose activations come before the convolutions.

    >>> [round(beta, 3) for beta in branch_betas([False, True, False], alpha=0.2)]
    [1.0, 0.989, 1.02]
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    cell = min(alpha / _CELLS_PER_ALPHA, 1 / _CELLS_PER_UNIT)
    values = cell * torch.arange(
        math.ceil(_DEVIATIONS * math.sqrt(1 + (len(transitions) + 1) * alpha**2) / cell), dtype=torch.float64
    )
    reach = math.ceil(_DEVIATIONS * alpha / cell)
    step = _masses(cell * torch.arange(-reach, reach + 1, dtype=torch.float64), cell, alpha)
    chances = _rectified(values, cell, 1.0)
    betas = []
    for transition in transitions:
        mean = (chances * values).sum()
        betas.append(math.sqrt(float((chances * (values - mean).square()).sum()) / RELU_VARIANCE))
        chances = _rectified(values, cell, math.sqrt(1 + alpha**2)) if transition else _walked(chances, step)
    return betas


def _masses(values: Tensor, cell: float, deviation: float) -> Tensor:
    """The chances of N(0, deviation^2) to fall into cells around `values`."""
    ends = torch.cat([values - cell / 2, values[-1:] + cell / 2]) / deviation
    chances: Tensor = torch.special.ndtr(ends).diff()
    return chances


def _rectified(values: Tensor, cell: float, deviation: float) -> Tensor:
    """The chances of the values of relu(deviation * z)."""
    chances = _masses(values, cell, deviation)
    chances[0] += 1 - chances.sum()
    return chances


def _walked(chances: Tensor, step: Tensor) -> Tensor:
    """The chances of relu(x + alpha * z), from those of x and of the steps."""
    reach = len(step) // 2
    spread = torch.nn.functional.conv1d(chances[None, None], step.flip(0)[None, None], padding=2 * reach)[0, 0]
    found = spread[reach : reach + len(chances)].clone()
    found[0] += spread[:reach].sum()
    return found
