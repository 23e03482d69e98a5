"""Runs in processes of their own, to be finished or killed."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchless.runs import load_checkpoint


def environment() -> dict[str, str]:
    """One thread, no warnings, and what the tests share can be imported."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def finish(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Let it run to its end, which is a good one."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def kill_after(command: list[str], folder: Path, reached: Callable[[Any], bool], *, seconds: float = 200) -> None:
    """SIGKILL the run and all its processes as soon as `reached` is true of its last checkpoint."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    last = folder / "checkpoints" / "last.pt"
    try:
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            if last.exists() and reached(load_checkpoint(last)):
                break
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it was killed"
    finally:
        # torchrun gives its workers sessions of their own; they are killed first, as in a power cut nobody is left over.
        for pid in reversed(with_descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def with_descendants(pid: int) -> list[int]:
    """The process and those that it, or one of them, has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(word) for word in children.read_text().split()] if children.exists() else []
    return [pid, *(each for child in below for each in with_descendants(child))]
