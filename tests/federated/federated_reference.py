"""The formulas of federated averaging again, slow and obvious: Python floats and loops, from the papers' equations.

Nothing here is imported from batchless. Letters: w a client's tensor, n_k its images, x_t the server's tensor in round t.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """arXiv 1602.05629, algorithm 1: sum_k n_k / n w_k, in exact arithmetic, rounded to float64 at the end."""
    result = torch.empty(values[0].shape, dtype=torch.float64)
    flat = [value.flatten().tolist() for value in values]
    total = sum(Fraction(weight) for weight in weights)
    for i in range(result.numel()):
        mean = (
            sum(Fraction(weight) * Fraction(numbers[i]) for weight, numbers in zip(weights, flat, strict=True)) / total
        )
        result.view(-1)[i] = float(mean)
    return result


def summed_in_blocks(rows: Sequence[tuple[float, Sequence[float]] | None], *, block: int) -> list[float]:
    """Weight times value in blocks of positions, each in order, then the blocks in order; None: a client that failed."""
    sums = []
    for begin in range(0, len(rows), block):
        arrived = [[weight * value for value in values] for weight, values in filter(None, rows[begin : begin + block])]
        if arrived:
            sums.append(arrived[0])
            for row in arrived[1:]:
                sums[-1] = [total + value for total, value in zip(sums[-1], row, strict=True)]
    total = sums[0]
    for row in sums[1:]:
        total = [left + right for left, right in zip(total, row, strict=True)]
    return total


def server_momentum(start: float, means: Sequence[float], *, learning_rate: float, momentum: float) -> float:
    """arXiv 1909.06335: v <- momentum v + Delta, x <- x + learning_rate v."""
    x, v = start, 0.0
    for mean in means:
        v = momentum * v + (mean - x)
        x = x + learning_rate * v
    return x


def server_adaptive(
    start: float,
    means: Sequence[float],
    *,
    yogi: bool,
    learning_rate: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> float:
    """arXiv 2003.00295, algorithm 2, from v_{-1} = tau^2, without bias correction."""
    x, m, v = start, 0.0, tau**2
    for mean in means:
        delta = mean - x
        m = beta1 * m + (1 - beta1) * delta
        if yogi:
            gap = v - delta**2
            v = v - (1 - beta2) * delta**2 * ((gap > 0) - (gap < 0))
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + learning_rate * m / (math.sqrt(v) + tau)
    return x


def proximal_steps(
    model: nn.Module,
    steps: Sequence[Sequence[tuple[Tensor, Tensor]]],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    mu: float,
    learning_rate: float,
    clip_norm: float,
    clip_first: bool = False,
) -> float:
    """Train `model` in place on arXiv 1812.06127 eq. 2, `loss + mu/2 sum_i (w_i - w_t,i)^2`, by gradient descent.

    Each step is a list of micro-batches; its loss is the mean over their images. The gradient of the whole objective is
    clipped to `clip_norm` (`clip_first`: only that of the loss, a known mistake). Returns the largest unclipped norm.
    """
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    largest = 0.0
    for step in steps:
        images = sum(len(labels) for _, labels in step)
        objective = sum(loss(model, x, y) for x, y in step) / images
        proximal = sum(mu / 2 * ((w - a) ** 2).sum() for w, a in zip(parameters, start, strict=True))
        parts = [torch.autograd.grad(part, parameters, retain_graph=True) for part in (objective, proximal)]
        gradient = parts[0] if clip_first else [g + p for g, p in zip(*parts, strict=True)]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
        largest = max(largest, norm)
        factor = min(1.0, clip_norm / (norm + 1e-6))
        gradient = [g * factor for g in gradient]
        if clip_first:
            gradient = [g + p for g, p in zip(gradient, parts[1], strict=True)]
        with torch.no_grad():
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter -= learning_rate * g
    return largest


def clipped_mean(
    start: Sequence[float], changes: Sequence[Sequence[float]], *, clip_norm: float, expected_clients: float
) -> list[float]:
    """arXiv 1710.06963: w + sum_k min(1, S / ||d_k||) d_k / (q W), without noise."""
    result = list(start)
    for change in changes:
        norm = math.sqrt(math.fsum(d * d for d in change))
        for i, d in enumerate(change):
            result[i] += min(1.0, clip_norm / norm) * d / expected_clients
    return result


def noised_gradient(gradients: Sequence[Sequence[float]], *, clip_norm: float, expected_images: float) -> list[float]:
    """arXiv 1607.00133, algorithm 1, without noise: sum_i g_i / max(1, ||g_i|| / C), over the expected size of a lot."""
    result = [0.0] * len(gradients[0])
    for gradient in gradients:
        norm = math.sqrt(math.fsum(g * g for g in gradient))
        for i, g in enumerate(gradient):
            result[i] += g / max(1.0, norm / clip_norm) / expected_images
    return result
