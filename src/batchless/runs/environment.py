"""What a result depends on besides its configuration: machine, versions, command, time."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def describe_environment(*, seed: int) -> dict[str, object]:
    """Describe the machine, the versions, the command line and the time of now as values JSON can hold.

    `git_commit` is None unless this package's own files are tracked by git; `git_dirty` says whether they differ
    from that commit. Whatever cannot be found out is None; nothing here raises.
    """
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "seed": seed,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": _gpus(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "allocator": _allocator(),
        "torchvision": _version("torchvision"),
        "timm": _version("timm"),
        "batchless": _version("batchless"),
        **git_state(PACKAGE),
    }


def git_state(package: Path) -> dict[str, object]:
    """Return the commit that holds the files in `package`, and whether they have changed since; None where unknown."""
    nowhere: dict[str, object] = {"git_commit": None, "git_dirty": None}
    # A virtual environment often lies inside someone else's checkout: that project's commit says nothing about us.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return nowhere
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    if not commit or changes is None:
        return nowhere
    return {"git_commit": commit, "git_dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    # GIT_DIR and its like, set inside hooks, point git at another repository than the one `folder` lies in.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10,
            env={**variables, "GIT_OPTIONAL_LOCKS": "0"},
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _gpus() -> str | None:
    import torch

    try:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception:  # a broken driver raises many things, and none of them is a reason not to train on the CPU
        return None
    return ", ".join(names) or None


def _allocator() -> str | None:
    """What the environment tells the C library's allocator; None for nothing: page faults can take a tenth of a step."""
    given = {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(given.items())) or None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
