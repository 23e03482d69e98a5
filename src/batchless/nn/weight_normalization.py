"""Weight Normalization (Salimans & Kingma, arXiv 1602.07868) and its centred form, to compare with."""

from typing import Any

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
from batchless.nn.weight_matrix import from_matrix, to_matrix

_SMALLEST_NORM = 1e-12
"""Rows shorter than this are divided by it instead, so that a zero row stays zero with finite gradients."""


def normalize_weight(
    weight: Tensor, gain: Tensor, *, centred: bool = False, transposed: bool = False, groups: int = 1
) -> Tensor:
    """Weight whose row for every output channel has norm `|gain_i|`.

    `W_hat_i = gain_i * V_i / ||V_i||` with `V = W`, or `V_i = W_i - mean_j W_ij` if `centred`.

    Args:
        weight: W, `[O, inputs/groups, K..]`, `[O, inputs]`, or `[inputs, O/groups, K..]` if `transposed`.
        gain: `[O]`.
        centred: whether the row's mean is subtracted first.
        transposed: whether `weight` is a transposed convolution's.
        groups: groups of the convolution.

    Returns:
        W_hat in the shape and dtype of `weight`; norms are float32 or wider.

    Source: arXiv 1602.07868, eq. 2; centred: arXiv 1710.02338.
    """
    directions, norms = _directions(weight, centred=centred, transposed=transposed, groups=groups)
    rows = directions * (gain.to(norms.dtype).unsqueeze(1) / norms)
    return from_matrix(rows, weight, transposed=transposed, groups=groups).to(weight.dtype)


def _directions(weight: Tensor, *, centred: bool, transposed: bool, groups: int) -> tuple[Tensor, Tensor]:
    rows = to_matrix(weight, transposed=transposed, groups=groups)
    rows = rows.to(at_least_float32(rows.dtype))
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    return rows, torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)


class NormalizedWeight(Reparameterized):
    """Abstract: what weight normalization and its centred form share; `gain` `[O]` is in the state dict."""

    centred: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        outputs = self.weight.numel() // self.weight_fan_in()
        self.gain = nn.Parameter(torch.ones(outputs, device=self.weight.device, dtype=self.weight.dtype))
        self.reset_gain()

    def reset_gain(self) -> None:
        """Set the gain to the norm of the rows, so that `W_hat` is the weight itself (centred: the centred weight)."""
        with torch.no_grad():
            _, norms = _directions(self.weight, centred=self.centred, transposed=self.transposed, groups=self.groups)
            self.gain.copy_(norms.squeeze(1))

    def reparameterized_weight(self) -> Tensor:
        """`normalize_weight(weight, gain)`."""
        return normalize_weight(
            self.weight, self.gain, centred=self.centred, transposed=self.transposed, groups=self.groups
        )

    def row_map(self) -> None:
        """None: rows are divided by their norm, and the gain is learned."""


class WeightNormalized(NormalizedWeight):
    """Abstract: `W_hat_i = gain_i * W_i / ||W_i||`; the gain starts at the norm, so the layer's function is unchanged."""

    centred = False


class CentredWeightNormalized(NormalizedWeight):
    """Abstract: `W_hat_i = gain_i * (W_i - mu_i) / ||W_i - mu_i||`.

    Raises:
        ValueError: fan-in of 1.
    """

    centred = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_fan_in(self, reason="centring would set every weight to 0")


class WNConv1d(WeightNormalized, ConvForward, nn.Conv1d):
    """`torch.nn.Conv1d` with weight normalization."""


class WNConv2d(WeightNormalized, ConvForward, nn.Conv2d):
    """`torch.nn.Conv2d` with weight normalization."""


class WNConv3d(WeightNormalized, ConvForward, nn.Conv3d):
    """`torch.nn.Conv3d` with weight normalization."""


class WNConvTranspose1d(WeightNormalized, ConvTransposeForward, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with weight normalization."""


class WNConvTranspose2d(WeightNormalized, ConvTransposeForward, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with weight normalization."""


class WNConvTranspose3d(WeightNormalized, ConvTransposeForward, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with weight normalization."""


class WNLinear(WeightNormalized, LinearForward, nn.Linear):
    """`torch.nn.Linear` with weight normalization."""


class CWNConv1d(CentredWeightNormalized, ConvForward, nn.Conv1d):
    """`torch.nn.Conv1d` with centred weight normalization."""


class CWNConv2d(CentredWeightNormalized, ConvForward, nn.Conv2d):
    """`torch.nn.Conv2d` with centred weight normalization."""


class CWNConv3d(CentredWeightNormalized, ConvForward, nn.Conv3d):
    """`torch.nn.Conv3d` with centred weight normalization."""


class CWNConvTranspose1d(CentredWeightNormalized, ConvTransposeForward, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with centred weight normalization."""


class CWNConvTranspose2d(CentredWeightNormalized, ConvTransposeForward, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with centred weight normalization."""


class CWNConvTranspose3d(CentredWeightNormalized, ConvTransposeForward, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with centred weight normalization."""


class CWNLinear(CentredWeightNormalized, LinearForward, nn.Linear):
    """`torch.nn.Linear` with centred weight normalization."""
