"""TensorFlow's SAME padding, which depends on the size of the input."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class SamePad(nn.Module):
    """Zero-pad so that a convolution gives `ceil(size / stride)` outputs per dimension, the odd one at the end.

    Args:
        kernel_size: of the convolution that follows, per dimension.
        stride: of it.
        dilation: of it.
    """

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)

    def forward(self, input: Tensor) -> Tensor:
        """Pad the last dimensions of `input`."""
        padding: list[int] = []
        sizes = input.shape[-len(self.kernel_size) :]
        for size, kernel, stride, dilation in zip(sizes, self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(size // -stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            padding = [total // 2, total - total // 2, *padding]
        return F.pad(input, padding)
