"""Devices by name."""

import re

import torch


def require_device(device: str) -> None:
    """Raise ValueError if `device` is no name of one, or this machine has not got it."""
    require_device_name(device)
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and index >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device={device}, but this machine has {found or 'no'} CUDA devices: use device=cpu")


def require_device_name(device: str) -> None:
    """Raise ValueError if `device` is no name of a device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, or cuda:<number>, got {device!r}")
