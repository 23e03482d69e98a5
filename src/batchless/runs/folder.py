"""The writing side of a run folder: everything a run leaves behind, so that it can be judged and repeated.

config.yaml         the resolved configuration; giving it back reproduces the run
environment.json    machine, versions, command line, start time, seed
metrics.jsonl       one JSON object per line, appended while the run goes on
checkpoints/*.pt    written atomically
summary.json        the final numbers, or {"failed": "reason"}; absent while the run has not ended
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from batchless.runs.atomic import reason, write_text
from batchless.runs.checkpoint import save_checkpoint
from batchless.runs.environment import describe_environment

CONFIG, ENVIRONMENT, METRICS, SUMMARY, CHECKPOINTS = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run folder being written; make one with `RunFolder.create`, read one with `read_run`."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, *, config: Mapping[str, object], seed: int) -> "RunFolder":
        """Make the folder and write its configuration and environment.

        Args:
            path: the folder; it may exist, but not hold a run.
            config: the resolved configuration: strings, numbers, booleans, None, paths, and mappings and sequences
                of these.
            seed: the seed the run starts from, kept in `environment.json`.

        Raises:
            ValueError: the folder holds a run, cannot be made, or `config` holds something YAML cannot give back.
        """
        path = Path(path)
        text = yaml.safe_dump(_plain(config, where="config"), sort_keys=False, allow_unicode=False)
        try:
            held = [name for name in (CONFIG, ENVIRONMENT, METRICS, SUMMARY, CHECKPOINTS) if (path / name).exists()]
            if held:
                raise ValueError(
                    f"{path} already holds a run ({held[0]}); choose another folder, such as {_free(path)}"
                )
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the run folder {path}: {reason(error)}; choose another folder") from error
        write_text(path / ENVIRONMENT, strict_json(describe_environment(seed=seed), indent=2))
        write_text(path / CONFIG, text)
        return cls(path=path)

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


def _free(path: Path) -> Path:
    number = 2
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
