"""Files that are either the old one or the new one, never half of one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` only when the block ends without an exception.

    The new file lies beside `path` (a rename is atomic only within one file system), reaches the disk before the
    rename, and is removed when anything goes wrong; what was at `path` before then is as it was. OSErrors pass through.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # not tempfile: its files are readable by their owner alone, for ever
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically.

    Lone surrogates (from file names that are not UTF-8) are written as backslash escapes. A disk that is full or
    read-only is a ValueError which says so.
    """
    try:
        with replacing(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {reason(error)}; what was there before is unchanged") from error


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files that processes killed while writing `path` have left; for a file with one writer."""
    for file in path.parent.iterdir():
        if file.name.startswith(f".{path.name}.") and file.name.endswith(".tmp"):
            file.unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """One line on why: the operating system's words without its number and path, else the first line of the text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems, and Windows, have no fsync of folders; the rename has happened anyway
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
