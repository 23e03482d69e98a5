"""How much memory a run has needed."""

import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak_memory(device: str) -> None:
    """Begin to measure: what this process held at once before does not count (on Linux and on CUDA devices)."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # another system, or a container that forbids it: the peak is then that of the process
        _FORGET.write_text("5")


def peak_memory_bytes(device: str) -> int:
    """The most memory held at once so far: by torch on a CUDA device, else by this process; 0 where it cannot be known."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes
