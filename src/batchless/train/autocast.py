"""Half precision by its name."""

import torch
from torch.amp.autocast_mode import autocast as torch_autocast
from torch.amp.grad_scaler import GradScaler

from batchless.train.settings import Precision


def autocast(device: str, precision: Precision) -> torch_autocast:
    """Torch's autocast for `precision`, switched off for float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "float32")


def loss_scaler(device: str, precision: Precision) -> GradScaler | None:
    """The scaler that fp16's gradients need, which would vanish below 6e-8; None for the others."""
    return GradScaler(torch.device(device).type) if precision == "fp16" else None
