"""The precision in which statistics are taken."""

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where it is narrower: sums in fp16 overflow, in bf16 they stop growing."""
    return torch.promote_types(dtype, torch.float32)
