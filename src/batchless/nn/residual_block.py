"""What of a residual block has to be known from outside: which normalization ends its branch."""

from typing import ClassVar

from torch import nn


class ResidualBlock(nn.Module):
    """Abstract: a block that adds a branch to a shortcut."""

    last_normalization: ClassVar[str]
    """The attribute that holds the branch's last normalization, before the sum."""
