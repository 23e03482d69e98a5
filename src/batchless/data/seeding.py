"""Seeding what torch draws from."""

import torch


def seed_torch(seed: int, device: str) -> None:
    """`torch.manual_seed` for what draws on `device` and on the CPU.

    torch's own also queues the seed for each kind of accelerator that is not in use yet, with a traceback of the caller
    each: 5 % of an optimizer step of a small network (`python -m bench federated`).
    """
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
