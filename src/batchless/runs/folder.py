"""The writing side of a run folder: everything a run leaves behind, so that it can be judged and repeated.

config.yaml         the resolved configuration; giving it back reproduces the run
environment.json    machine, versions, command line, start time, seed
metrics.jsonl       one JSON object per line, appended while the run goes on
tensorboard/        the same as TensorBoard events
checkpoints/*.pt    written atomically
summary.json        the final numbers, or {"failed": "reason"}; absent while the run has not ended
.lock               held by the process that writes
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from batchless.runs.atomic import reason, write_text
from batchless.runs.checkpoint import save_checkpoint
from batchless.runs.environment import describe_environment
from batchless.runs.events import EventWriter
from batchless.runs.lock import FolderLock

CONFIG, ENVIRONMENT, METRICS, SUMMARY, CHECKPOINTS, EVENTS = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
    "tensorboard",
)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run folder being written; make one with `RunFolder.create` or `resume`, read one with `read_run`.

    As a context manager it is released at the end: until then no other process can write it.
    """

    path: Path
    lock: FolderLock
    events: EventWriter | None

    @classmethod
    def create(
        cls, path: str | Path, *, config: Mapping[str, object], seed: int, tensorboard: bool = False
    ) -> "RunFolder":
        """Make the folder and write its configuration and environment.

        Args:
            path: the folder; it may exist, but not hold a run.
            config: the resolved configuration: strings, numbers, booleans, None, paths, and mappings and sequences
                of these.
            seed: the seed the run starts from, kept in `environment.json`.
            tensorboard: whether what is logged is written as TensorBoard events too.

        Raises:
            ValueError: the folder holds a run, is in use, cannot be made, or `config` holds something YAML cannot give back.
        """
        path = Path(path)
        text = yaml.safe_dump(_plain(config, where="config"), sort_keys=False, allow_unicode=False)
        try:
            require_no_run(path)
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the run folder {path}: {reason(error)}; choose another folder") from error
        lock = FolderLock(path)
        try:
            write_text(path / ENVIRONMENT, strict_json(describe_environment(seed=seed), indent=2))
            write_text(path / CONFIG, text)
        except BaseException:
            lock.release()
            raise
        return cls(path=path, lock=lock, events=EventWriter(path / EVENTS) if tensorboard else None)

    @classmethod
    def resume(cls, path: str | Path, *, images: int, tensorboard: bool = False) -> "RunFolder":
        """Go on with the run in the folder, from `images` images on; the mark that it failed is taken away.

        Raises:
            ValueError: no run there, one that has ended well, or a folder in use.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path} holds no run (no {CONFIG}): give the folder of the run to go on with")
        lock = FolderLock(path)
        try:
            (path / SUMMARY).unlink(missing_ok=True)
        except OSError as error:
            lock.release()
            raise ValueError(f"cannot write in {path}: {reason(error)}") from error
        return cls(path=path, lock=lock, events=EventWriter(path / EVENTS, resumed_at=images) if tensorboard else None)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Close the events, and let other processes write the folder."""
        if self.events is not None:
            self.events.close()
        self.lock.release()

    def metrics_bytes(self) -> int:
        """The length of `metrics.jsonl` so far."""
        file = self.path / METRICS
        return file.stat().st_size if file.exists() else 0

    def forget_metrics_after(self, length: int) -> None:
        """Cut `metrics.jsonl` to its first `length` bytes: what came later will be logged again.

        ValueError if it is shorter, so that the checkpoint belongs to another run.
        """
        if self.metrics_bytes() < length:
            raise ValueError(
                f"{self.path / METRICS} is shorter than when the checkpoint was written: it is of another run, or damaged"
            )
        if self.metrics_bytes() > length:
            os.truncate(self.path / METRICS, length)

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Append `record` to `metrics.jsonl` and flush it; nan and infinities become "nan", "inf", "-inf".

        ValueError for a value that is no number or text, and for a full disk; the lines before stay whole.
        """
        for key, value in record.items():
            if not isinstance(value, float | int | str):
                raise ValueError(
                    f"the metric {key!r} is a {type(value).__name__}; a number or a text is possible: use .item()"
                )
        file = self.path / METRICS
        line = strict_json(record).encode()
        try:
            with file.open("ab", buffering=0) as stream:
                end = stream.tell()
                try:
                    if stream.write(line) != len(line):
                        raise OSError(None, "the disk is full")
                except OSError:
                    stream.truncate(end)  # half a line in the middle would make the lines after it unreadable
                    raise
        except OSError as error:
            raise ValueError(f"cannot append to {file}: {reason(error)}; the lines before are intact") from error
        if self.events is not None:
            self.events.add(record)

    def save_checkpoint(self, name: str, state: Mapping[str, Any]) -> Path:
        """Write `checkpoints/<name>.pt` atomically and return its path; see `batchless.runs.load_checkpoint`.

        ValueError if the disk is full; an earlier checkpoint of that name is then intact.
        """
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(
                f"a checkpoint's name is one word without slashes or a leading dot, such as last, not {name!r}"
            )
        path = self.path / CHECKPOINTS / f"{name}.pt"
        save_checkpoint(path, state)
        return path

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write `summary.json`, which marks the run as ended: final numbers, or `{"failed": "reason"}`."""
        write_text(self.path / SUMMARY, strict_json(summary, indent=2))


def strict_json(value: object, *, indent: int | None = None) -> str:
    """Return `value` as strict JSON with a final newline; nan and infinities become "nan", "inf", "-inf"."""
    return json.dumps(_finite(_plain(value, where="value")), indent=indent, allow_nan=False) + "\n"


def _plain(value: object, *, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where=f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where=f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # subclasses (numpy's float64, StrEnum) become what YAML and JSON can give back
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(f"{where} is a {type(value).__name__}, which a run folder cannot hold; give a number or a text")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def require_no_run(path: Path) -> None:
    """Raise ValueError if the folder holds a run, with the name of a free one."""
    held = [name for name in (CONFIG, METRICS, SUMMARY, CHECKPOINTS) if (path / name).exists()]
    if held:
        raise ValueError(
            f"{path} already holds a run ({held[0]}); go on with it by --resume {path}, or choose another folder, "
            f"such as {_free(path)}"
        )


def _free(path: Path) -> Path:
    number = 2
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
