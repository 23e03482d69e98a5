"""What of a residual block has to be known from outside: how its branch begins and ends, and its shortcut."""

from typing import ClassVar

from torch import nn


class ResidualBlock(nn.Module):
    """Abstract: a block that adds a branch to a shortcut."""

    first_convolution: ClassVar[str]
    """The attribute that holds the branch's first layer, which sees what the shortcut sees."""
    last_convolution: ClassVar[str]
    """The attribute that holds the branch's last convolution."""
    last_normalization: ClassVar[str]
    """The attribute that holds the normalization after it, before the sum."""
    shortcut_name: ClassVar[str]
    """The attribute that holds the shortcut: empty, or a convolution with a normalization."""
