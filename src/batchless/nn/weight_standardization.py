"""Weight Standardization (Qiao et al., arXiv 1903.10520, eq. 10) and the layers that use it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchless.nn.precision import at_least_float32
from batchless.nn.reparameterized import (
    ConvForward,
    ConvTransposeForward,
    LinearForward,
    Reparameterized,
    require_fan_in,
)
from batchless.nn.standardized_rows import RowStandardization, from_first
from batchless.nn.weight_matrix import fan_in, from_matrix, to_matrix

EpsPlacement = Literal["inside", "outside", "clamp"]


@dataclass(frozen=True)
class StandardizationPreset:
    """How one public implementation turns a row's variance into its divisor.

    With `var` the variance of a row of I weights (divided by I - 1 if `unbiased`, else by I), the divisor is
    `sqrt(var + eps)` for placement `inside`, `sqrt(var) + eps` for `outside`, and `sqrt(max(var, eps / I))` for `clamp`.
    """

    eps: float
    unbiased: bool = False
    placement: EpsPlacement = "inside"


PRESETS = {
    "paper": StandardizationPreset(eps=1e-5),
    "authors": StandardizationPreset(eps=1e-5, unbiased=True, placement="outside"),
    "authors-bcn": StandardizationPreset(eps=1e-5, unbiased=True),
    "timm": StandardizationPreset(eps=1e-6),
    "bit": StandardizationPreset(eps=1e-10),
    "nfnet": StandardizationPreset(eps=1e-4, placement="clamp"),
}
"""`paper`: arXiv 1903.10520v2; `authors`: the WeightStandardization repository and MMCV's ConvWS; `authors-bcn`: the
Batch-Channel-Normalization repository's ImageNet code; `timm`: StdConv2d (the default); `bit`: Big Transfer; `nfnet`:
DeepMind's `rsqrt(max(var * I, 1e-4))`."""


def resolve_preset(
    preset: str, *, eps: float | None = None, unbiased: bool | None = None, placement: EpsPlacement | None = None
) -> StandardizationPreset:
    """The named preset, with the values given replacing its own.

    Raises:
        ValueError: an unknown preset or placement, or a negative eps.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown weight standardization preset {preset!r}: choose from {', '.join(PRESETS)}")
    if placement not in (None, "inside", "outside", "clamp"):
        raise ValueError(f"unknown eps placement {placement!r}: choose from inside, outside, clamp")
    if eps is not None and not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}: a filter of constant value would be divided by zero")
    base = PRESETS[preset]
    return StandardizationPreset(
        eps=base.eps if eps is None else eps,
        unbiased=base.unbiased if unbiased is None else unbiased,
        placement=base.placement if placement is None else placement,
    )


def standardize_weight(
    weight: Tensor,
    preset: str = "timm",
    *,
    eps: float | None = None,
    unbiased: bool | None = None,
    placement: EpsPlacement | None = None,
    scale: float | Tensor = 1.0,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """Weight with zero mean and unit variance over the fan-in of every output channel.

    `W_hat_ij = scale_i * (W_ij - mu_i) / sigma_i` with `mu_i = mean_j W_ij` and `sigma_i` from the variance
    `mean_j (W_ij - mu_i)^2` by the preset's rule: for the default, `sqrt(var_i + 1e-6)`.

    Args:
        weight: W, `[O, inputs/groups, K..]`, `[O, inputs]`, or `[inputs, O/groups, K..]` if `transposed`.
        preset: a name in `PRESETS`; the three arguments after it replace single values of it.
        eps: added to the variance or the deviation, or the floor of `var * I`; see `StandardizationPreset`.
        unbiased: whether the variance is divided by I - 1.
        placement: where eps goes.
        scale: one factor for all output channels, or `[O]`.
        transposed: whether `weight` is a transposed convolution's.
        groups: groups of the convolution (only a transposed convolution's layout depends on it).

    Returns:
        W_hat in the shape and dtype of `weight`; statistics are float32 or wider. A row of equal values gives zeros, with
        finite gradients.

    Raises:
        ValueError: unknown preset, or a fan-in of 1, whose standardized weight would be 0 whatever the weight.

    Source: arXiv 1903.10520, eq. 10; the variants are listed in docs/definitions.md.

    >>> w_hat = standardize_weight(torch.randn(8, 4, 3, 3))
    >>> bool(w_hat.mean((1, 2, 3)).abs().max() < 1e-5), bool((w_hat.var((1, 2, 3), correction=0) - 1).abs().max() < 1e-3)
    (True, True)
    """
    rule = resolve_preset(preset, eps=eps, unbiased=unbiased, placement=placement)
    inputs = fan_in(weight, transposed=transposed, groups=groups)
    if inputs < 2:
        raise ValueError(f"cannot standardize a weight of shape {tuple(weight.shape)}: its fan-in is 1; leave it plain")
    rows = to_matrix(weight, transposed=transposed, groups=groups)
    rows = rows.to(at_least_float32(rows.dtype))
    fused = row_standardization(rule, inputs, scale)
    standardized = _divide(rows, rule, scale) if fused is None else fused(rows)
    return from_matrix(standardized, weight, transposed=transposed, groups=groups).to(weight.dtype)


def row_standardization(
    rule: StandardizationPreset, inputs: int, scale: float | Tensor = 1.0
) -> RowStandardization | None:
    """The preset's rule for rows of `inputs` values as one fused map; None where eps is not added to the variance."""
    if rule.placement != "inside":
        return None
    # (W - mu) / sqrt(k var + eps) = k^-1/2 (W - mu) / sqrt(var + eps / k), with k = I / (I - 1) if unbiased.
    correction = inputs / (inputs - 1) if rule.unbiased else 1.0
    return RowStandardization(eps=rule.eps / correction, factor=scale * correction**-0.5)


def _divide(rows: Tensor, rule: StandardizationPreset, scale: float | Tensor) -> Tensor:
    inputs = rows.shape[1]
    rows = from_first(rows)
    centred = rows - rows.mean(1, keepdim=True)
    # vector_norm has gradient 0 at 0, where the square root of a variance has NaN.
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) * (inputs - int(rule.unbiased)) ** -0.5
    divisor = deviation + rule.eps if rule.placement == "outside" else deviation.clamp_min((rule.eps / inputs) ** 0.5)
    factor = scale.to(rows.dtype).unsqueeze(1) if isinstance(scale, Tensor) else scale
    rows_hat: Tensor = centred * (factor / divisor)
    return rows_hat


class WeightStandardized(Reparameterized):
    """Abstract: a layer whose weight is standardized per output channel, `standardize_weight`, without gain.

    Arguments are those of torch's layer, then by keyword:

    Args:
        preset: which public implementation to reproduce, see `PRESETS`.
        eps: replaces the preset's.

    Raises:
        ValueError: unknown preset; fan-in of 1.
    """

    def __init__(self, *args: Any, preset: str = "timm", eps: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preset, self.eps = preset, eps
        resolve_preset(preset, eps=eps)
        require_fan_in(self, reason="standardizing would set every weight to 0")

    def reparameterized_weight(self) -> Tensor:
        """`standardize_weight(weight)` with the layer's preset."""
        return standardize_weight(
            self.weight, self.preset, eps=self.eps, transposed=self.transposed, groups=self.groups
        )

    def row_map(self) -> RowStandardization | None:
        """The preset's rule, where it is one fused map."""
        return row_standardization(resolve_preset(self.preset, eps=self.eps), self.weight_fan_in())


class WSConv1d(WeightStandardized, ConvForward, nn.Conv1d):
    """`torch.nn.Conv1d` whose weight is standardized."""


class WSConv2d(WeightStandardized, ConvForward, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight is standardized.

    >>> layer = WSConv2d(3, 8, 3, padding=1, bias=False, preset="authors")
    >>> layer(torch.randn(1, 3, 16, 16)).shape, list(layer.state_dict())
    (torch.Size([1, 8, 16, 16]), ['weight'])
    """


class WSConv3d(WeightStandardized, ConvForward, nn.Conv3d):
    """`torch.nn.Conv3d` whose weight is standardized."""


class WSConvTranspose1d(WeightStandardized, ConvTransposeForward, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` whose weight is standardized per output channel."""


class WSConvTranspose2d(WeightStandardized, ConvTransposeForward, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` whose weight is standardized per output channel."""


class WSConvTranspose3d(WeightStandardized, ConvTransposeForward, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` whose weight is standardized per output channel."""


class WSLinear(WeightStandardized, LinearForward, nn.Linear):
    """`torch.nn.Linear` whose weight is standardized per output."""
