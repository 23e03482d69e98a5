"""Every formula again, slow and obvious: float64, loops over channels and samples, from the papers' equations.

Nothing here is imported from batchless. Everything but the numbers of `accumulated_estimates` is differentiable.
Letters: N samples, C channels, G groups, O output channels, I fan-in of one output channel, W weight, k images of a move.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def output_rows(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> list[Tensor]:
    """For every output channel the vector [I] of weights that feed it."""
    weight = weight.double()
    if not transposed:
        return [weight[o].flatten() for o in range(weight.shape[0])]
    inputs, outputs_per_group = weight.shape[:2]
    rows = []
    for group in range(groups):
        for m in range(outputs_per_group):
            feeding = [weight[i, m].flatten() for i in range(inputs) if i // (inputs // groups) == group]
            rows.append(torch.cat(feeding))
    return rows


def from_output_rows(rows: list[Tensor], shape: torch.Size, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """The inverse of `output_rows`."""
    if not transposed:
        return torch.stack([row.reshape(shape[1:]) for row in rows])
    inputs, outputs_per_group, *kernel = shape
    inputs_per_group = inputs // groups
    by_input = []
    for i in range(inputs):
        group, position = divmod(i, inputs_per_group)
        pieces = [
            rows[group * outputs_per_group + m].reshape(inputs_per_group, *kernel)[position]
            for m in range(outputs_per_group)
        ]
        by_input.append(torch.stack(pieces))
    return torch.stack(by_input)


def _mean(w: Tensor) -> Tensor:
    return w.sum() / len(w)


def paper_row(w: Tensor, eps: float = 1e-5) -> Tensor:
    """arXiv 1903.10520v2 eq. 10: biased variance, eps inside the root."""
    return (w - _mean(w)) / torch.sqrt(((w - _mean(w)) ** 2).sum() / len(w) + eps)


def authors_row(w: Tensor, eps: float = 1e-5) -> Tensor:
    """The WeightStandardization repository, MMCV: torch's unbiased standard deviation plus eps."""
    return (w - _mean(w)) / (torch.sqrt(((w - _mean(w)) ** 2).sum() / (len(w) - 1)) + eps)


def authors_bcn_row(w: Tensor, eps: float = 1e-5) -> Tensor:
    """The Batch-Channel-Normalization repository's ImageNet code: unbiased variance, eps inside the root."""
    return (w - _mean(w)) / torch.sqrt(((w - _mean(w)) ** 2).sum() / (len(w) - 1) + eps)


def timm_row(w: Tensor, eps: float = 1e-6) -> Tensor:
    """timm's StdConv2d: biased variance, eps inside the root."""
    return (w - _mean(w)) / torch.sqrt(((w - _mean(w)) ** 2).sum() / len(w) + eps)


def bit_row(w: Tensor, eps: float = 1e-10) -> Tensor:
    """Big Transfer: biased variance, eps inside the root."""
    return (w - _mean(w)) / torch.sqrt(((w - _mean(w)) ** 2).sum() / len(w) + eps)


def nfnet_row(w: Tensor, eps: float = 1e-4) -> Tensor:
    """DeepMind's `(w - mean) * rsqrt(max(var * I, eps))`, times sqrt(I), which that code counts as part of the scale."""
    variance = ((w - _mean(w)) ** 2).sum() / len(w)
    return math.sqrt(len(w)) * (w - _mean(w)) * torch.rsqrt(torch.clamp(variance * len(w), min=eps))


ROWS: dict[str, Callable[..., Tensor]] = {
    "paper": paper_row,
    "authors": authors_row,
    "authors-bcn": authors_bcn_row,
    "timm": timm_row,
    "bit": bit_row,
    "nfnet": nfnet_row,
}


def standardized_weight(
    weight: Tensor, preset: str, *, eps: float | None = None, transposed: bool = False, groups: int = 1
) -> Tensor:
    """Weight standardization by one public implementation's formula."""
    options = {} if eps is None else {"eps": eps}
    rows = [ROWS[preset](row, **options) for row in output_rows(weight, transposed=transposed, groups=groups)]
    return from_output_rows(rows, weight.shape, transposed=transposed, groups=groups)


def scaled_standardized_weight(
    weight: Tensor,
    preset: str,
    *,
    gamma: float,
    gain: Tensor | None = None,
    stride: tuple[int, ...] = (),
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """`gamma * gain_i * (W - mu) / (sigma * sqrt(I))`; transposed: `sqrt(I / prod(stride))`."""
    rows = []
    for o, row in enumerate(output_rows(weight, transposed=transposed, groups=groups)):
        fan_in = len(row) / math.prod(stride) if transposed else len(row)
        gain_o = 1.0 if gain is None else gain.double()[o]
        rows.append(gamma * gain_o * ROWS[preset](row) / math.sqrt(fan_in))
    return from_output_rows(rows, weight.shape, transposed=transposed, groups=groups)


def normalized_weight(
    weight: Tensor, gain: Tensor, *, centred: bool = False, transposed: bool = False, groups: int = 1
) -> Tensor:
    """WN `g * W / ||W||`, CWN `g * (W - mu) / ||W - mu||`."""
    rows = []
    for o, row in enumerate(output_rows(weight, transposed=transposed, groups=groups)):
        direction = row - _mean(row) if centred else row
        rows.append(gain.double()[o] * direction / torch.sqrt((direction**2).sum()))
    return from_output_rows(rows, weight.shape, transposed=transposed, groups=groups)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Output, batch mean, and biased batch variance of batch normalization in training."""
    x = x.double()
    means, variances, channels = [], [], []
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        channels.append(weight.double()[c] * (values - mean) / torch.sqrt(variance + eps) + bias.double()[c])
        means.append(mean)
        variances.append(variance)
    return torch.stack(channels, 1), torch.stack(means), torch.stack(variances)


def normalize_by(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`weight_c * (x - mean_c) / sqrt(var_c + eps) + bias_c` by constants."""
    channels = [
        weight.double()[c] * (x.double()[:, c] - mean.double()[c]) / torch.sqrt(var.double()[c] + eps)
        + bias.double()[c]
        for c in range(x.shape[1])
    ]
    return torch.stack(channels, 1)


def move_rate(images: int, memory: float, *, move: int | None = None) -> float:
    """`1 - (1 - 1/memory)^images`; with warm-up not below `1 / move`, the number of this move counted from 1."""
    rate = 1 - (1 - 1 / memory) ** images
    return rate if move is None else max(rate, 1 / move)


def moved_estimates(mean: Tensor, var: Tensor, x: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The authors' EstBN rule: the batch's mean, and its mean square about the old estimate; biased; no gradient."""
    return accumulated_estimates(mean, var, [x], rate)


def accumulated_estimates(mean: Tensor, var: Tensor, forwards: list[Tensor], rate: float) -> tuple[Tensor, Tensor]:
    """One move by all values of several forwards together, squares about the estimate before all of them."""
    means, variances = [], []
    for c in range(len(mean)):
        old = float(mean[c])
        values = [value for x in forwards for value in x.detach().double()[:, c].flatten().tolist()]
        if not values:
            return mean.double(), var.double()
        seen_mean = math.fsum(values) / len(values)
        seen_square = math.fsum((value - old) ** 2 for value in values) / len(values)
        means.append((1 - rate) * old + rate * seen_mean)
        variances.append((1 - rate) * float(var[c]) + rate * seen_square)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def channel_norm(y: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Step 2 of BCN: per sample and group of channels, then one gain and bias per group."""
    return _over_groups(y, num_groups, weight.double(), bias.double(), eps)


def group_norm(y: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Group normalization: statistics as `channel_norm`, one gain and bias per channel."""
    ones, zeros = y.new_ones(num_groups, dtype=torch.float64), y.new_zeros(num_groups, dtype=torch.float64)
    z = _over_groups(y, num_groups, ones, zeros, eps)
    return torch.stack([weight.double()[c] * z[:, c] + bias.double()[c] for c in range(y.shape[1])], 1)


def _over_groups(y: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = y.double()
    size = y.shape[1] // num_groups
    samples = []
    for n in range(y.shape[0]):
        pieces = []
        for g in range(num_groups):
            values = y[n, g * size : (g + 1) * size]
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
            pieces.append(weight[g] * (values - mean) / torch.sqrt(variance + eps) + bias[g])
        samples.append(torch.cat(pieces))
    return torch.stack(samples)


def large_batch_bcn(
    x: Tensor, channel_affine: tuple[Tensor, Tensor], group_affine: tuple[Tensor, Tensor], eps: float = 1e-5
) -> Tensor:
    """BCN with the batch's statistics: batch normalization, then channel normalization in `len(group_affine[0])` groups."""
    y, _, _ = batch_norm(x, *channel_affine, eps)
    return channel_norm(y, len(group_affine[0]), *group_affine, eps)


def micro_batch_bcn(
    x: Tensor,
    estimates: tuple[Tensor, Tensor],
    channel_affine: tuple[Tensor, Tensor],
    group_affine: tuple[Tensor, Tensor],
    *,
    rate: float,
    eps: float = 1e-5,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """BCN with estimates, the authors' rule: move them, normalize by the moved ones, then channel normalization."""
    moved = moved_estimates(*estimates, x, rate)
    y = normalize_by(x, *moved, *channel_affine, eps)
    return channel_norm(y, len(group_affine[0]), *group_affine, eps), moved


def adaptively_clipped(
    gradient: Tensor,
    weight: Tensor,
    clipping: float,
    *,
    floor: float = 1e-3,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """AGC, one unit (an output channel; a tensor with one non-singleton dimension is one unit) after the other."""
    gradient, weight = gradient.double(), weight.double()
    if sum(size != 1 for size in weight.shape) <= 1:
        return _clipped_unit(gradient, weight, clipping, floor)
    layout = {"transposed": transposed, "groups": groups}
    units = zip(output_rows(gradient, **layout), output_rows(weight, **layout), strict=True)
    return from_output_rows([_clipped_unit(g, w, clipping, floor) for g, w in units], weight.shape, **layout)


def _clipped_unit(gradient: Tensor, weight: Tensor, clipping: float, floor: float) -> Tensor:
    gradient_norm = math.sqrt(float((gradient**2).sum()))
    bound = clipping * max(math.sqrt(float((weight**2).sum())), floor)
    return gradient * (bound / max(gradient_norm, 1e-6)) if gradient_norm > bound else gradient


def activation_gain(activation: Callable[[Tensor], Tensor], *, points: int = 4_000_001, limit: float = 12.0) -> float:
    """`1 / std(activation(z))`, z ~ N(0, 1), by a dense Riemann sum."""
    z = torch.linspace(-limit, limit, points, dtype=torch.float64)
    mass = torch.exp(-(z**2) / 2)
    mass = mass / mass.sum()
    values = activation(z.clone())
    mean = (mass * values).sum()
    return 1 / math.sqrt(float((mass * (values - mean) ** 2).sum()))


def temporal_shift(x: Tensor, share: int, direction: str) -> Tensor:
    """TSM (arXiv 1811.08383, section 3.2): channels moved along time one by one, zeros where no frame is."""
    clips, frames, channels = x.shape[:3]
    fold = channels // share
    out = torch.zeros_like(x)
    for n in range(clips):
        for t in range(frames):
            for c in range(channels):
                source = t
                if direction == "past":
                    source = t - 1 if c < fold else t
                elif c < fold:
                    source = t + 1
                elif c < 2 * fold:
                    source = t - 1
                if 0 <= source < frames:
                    out[n, t, c] = x[n, source, c]
    return out


def branch_betas(transitions: list[bool], alpha: float, samples: int = 1_000_000) -> list[float]:
    """NF-ResNets' beta (arXiv 2101.08692, section 3) with the activation after the sum: by many units that are drawn."""
    z = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(samples, generator=z, dtype=torch.float64)

    unit = 0.5 - 0.5 / math.pi  # of relu(z)
    x = normal().relu()
    betas = []
    for transition in transitions:
        betas.append(math.sqrt(x.var() / unit))
        shortcut = normal() if transition else x  # a convolution of x / beta has variance 1, as the branch
        x = (shortcut + alpha * normal()).relu()
    return betas
