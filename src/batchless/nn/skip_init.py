"""A learnable scalar in place of a normalization whose gain started at zero (SkipInit)."""

import torch
from torch import Tensor, nn


class SkipInit(nn.Module):
    """`y = gain * x` with one learnable `gain`, starting at 0: a residual branch that begins as nothing.

    Args:
        num_features: channels of x, which only `batchless.fold` needs to know.
        device: of the scalar.
        dtype: of the scalar.

    Source: De & Smith, arXiv 2002.10444.
    """

    def __init__(
        self,
        num_features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.gain = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Scale `input`, of any shape."""
        return input * self.gain
