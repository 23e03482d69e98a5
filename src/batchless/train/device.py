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


def seed_torch(seed: int, device: str) -> None:
    """`torch.manual_seed` for what draws on `device` and on the CPU.

    torch's own also queues the seed for each kind of accelerator that is not in use yet, with a traceback of the caller
    each: 5 % of an optimizer step of a small network (`python -m bench federated`).
    """
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
