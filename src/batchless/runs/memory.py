"""How much memory a run has needed."""

import sys


def peak_memory_bytes(device: str) -> int:
    """The most memory held at once so far: by torch on a CUDA device, else by this process; 0 where it cannot be known."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
