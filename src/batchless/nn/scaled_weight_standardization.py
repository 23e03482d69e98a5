"""Scaled Weight Standardization (Brock et al., arXiv 2101.08692; FedWon, Zhuang & Lyu, ICLR 2024) and its layers."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from batchless.nn.reparameterized import (
    ConvForward,
    ConvTransposeForward,
    LinearForward,
    Reparameterized,
    require_fan_in,
)
from batchless.nn.standardized_rows import RowStandardization
from batchless.nn.weight_standardization import resolve_preset, row_standardization, standardize_weight


class ScaledWeightStandardized(Reparameterized):
    """Abstract: a layer whose weight is standardized and scaled so that the layer keeps its input's variance.

    `W_hat_ij = gamma * gain_i * (W_ij - mu_i) / (sigma_i * sqrt(I))`, I the fan-in of an output channel; for a transposed
    convolution I is divided by `prod(stride)`, since each output position sees only that share of the kernel.

    Arguments are those of torch's layer, then by keyword:

    Args:
        gamma: the gain of the activation that feeds this layer (`activation_gain`); 1 if none does. Not learned.
        gain: whether each output channel has a learnable gain, starting at 1 (NF-Nets: yes; FedWon: no). It is kept in
            the state dict under `gain`, shape `[O]`.
        preset: `timm` adds eps to the variance, `nfnet` is DeepMind's `rsqrt(max(var * I, 1e-4))`; others as in `PRESETS`.
        eps: replaces the preset's.

    Raises:
        ValueError: unknown preset; gamma not positive and finite; fan-in of 1.

    Source: arXiv 2101.08692, eq. 3; FedWon eq. 3.
    """

    gain: nn.Parameter | None

    def __init__(
        self,
        *args: Any,
        gamma: float = 1.0,
        gain: bool = False,
        preset: str = "timm",
        eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma must be positive and finite, got {gamma}")
        self.gamma, self.preset, self.eps = gamma, preset, eps
        resolve_preset(preset, eps=eps)
        require_fan_in(self, reason="standardizing would set every weight to 0")
        outputs = self.weight.numel() // self.weight_fan_in()
        self.gain = (
            nn.Parameter(torch.ones(outputs, device=self.weight.device, dtype=self.weight.dtype)) if gain else None
        )

    def reset_gain(self) -> None:
        """Set the learnable gain, where there is one, to 1."""
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def reparameterized_weight(self) -> Tensor:
        """The standardized weight times `gamma * gain / sqrt(I)`."""
        scale = self._scale()
        return standardize_weight(
            self.weight,
            self.preset,
            eps=self.eps,
            scale=scale if self.gain is None else scale * self.gain,
            transposed=self.transposed,
            groups=self.groups,
        )

    def row_map(self) -> RowStandardization | None:
        """The preset's rule times `gamma / sqrt(I)`, where it is one fused map and no gain is learned."""
        rule = resolve_preset(self.preset, eps=self.eps)
        return None if self.gain is not None else row_standardization(rule, self.weight_fan_in(), self._scale())

    def _scale(self) -> float:
        positions = math.prod(self.stride) if self.transposed else 1
        return float(self.gamma * (self.weight_fan_in() / positions) ** -0.5)


class ScaledWSConv1d(ScaledWeightStandardized, ConvForward, nn.Conv1d):
    """`torch.nn.Conv1d` with scaled weight standardization."""


class ScaledWSConv2d(ScaledWeightStandardized, ConvForward, nn.Conv2d):
    """`torch.nn.Conv2d` with scaled weight standardization."""


class ScaledWSConv3d(ScaledWeightStandardized, ConvForward, nn.Conv3d):
    """`torch.nn.Conv3d` with scaled weight standardization."""


class ScaledWSConvTranspose1d(ScaledWeightStandardized, ConvTransposeForward, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with scaled weight standardization."""


class ScaledWSConvTranspose2d(ScaledWeightStandardized, ConvTransposeForward, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with scaled weight standardization."""


class ScaledWSConvTranspose3d(ScaledWeightStandardized, ConvTransposeForward, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with scaled weight standardization."""


class ScaledWSLinear(ScaledWeightStandardized, LinearForward, nn.Linear):
    """`torch.nn.Linear` with scaled weight standardization."""
