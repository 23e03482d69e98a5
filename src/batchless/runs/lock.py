"""One process at a time writes a run folder."""

import os
import weakref
from pathlib import Path

from batchless.runs.atomic import reason

LOCK = ".lock"


class FolderLock:
    """Held from its making until `release`, or until nobody refers to it, or until the process is gone, however it ends.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"cannot write in {folder}: {reason(error)}; choose another folder") from error
        try:
            _lock(file)
        except OSError as error:
            holder = os.read(file, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise ValueError(
                f"{folder} is in use by another process (number {holder}): wait until it has ended, or end it"
            ) from error
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        self.release = weakref.finalize(self, os.close, file)
        """Let others write the folder; a second call does nothing."""


def _lock(file: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where nothing warns of a second process
        return
    # A POSIX lock belongs to the process: workers forked from it do not keep it when it is killed.
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
