"""The precision in which statistics are taken."""

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where it is narrower: sums in fp16 overflow, in bf16 they stop growing."""
    return torch.promote_types(dtype, torch.float32)


def in_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on where `tensor` is."""
    # Asking for one kind of device takes 20 us within a network, where its code is out of the caches: first whether for any.
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensor.device.type)
