"""The reading side of a run folder: no PyTorch, nothing executed, every complaint with its file and line."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from batchless.runs.atomic import reason
from batchless.runs.folder import CONFIG, ENVIRONMENT, METRICS, SUMMARY


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: the folder.
        config: the resolved configuration.
        environment: machine, versions, command line, start time and seed.
        metrics: the logged records, oldest first.
        summary: the final numbers or `{"failed": reason}`; None if the run has not ended.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None


def read_run(path: str | Path) -> Run:
    """Read the run folder at `path`.

    A last line of `metrics.jsonl` without its end (the process was killed while writing it) is left out; anything
    else that is not as it was written is a ValueError that names the file and the line.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        what = "holds no run (no config.yaml)" if path.is_dir() else "is no folder"
        raise ValueError(f"{path} {what}; give a folder that `batchless train` has written")
    summary = path / SUMMARY
    return Run(
        path=path,
        config=_read_yaml(path / CONFIG),
        environment=_read_json(path / ENVIRONMENT),
        metrics=_read_lines(path / METRICS) if (path / METRICS).exists() else (),
        summary=_read_json(summary) if summary.exists() else None,
    )


def find_runs(root: str | Path) -> list[Run]:
    """Read every run folder at or below `root`, in the order they were started.

    ValueError if `root` is no folder or a run in it cannot be read. No run at all is an empty list.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give the folder that holds the runs")
    runs = []
    for folder, below, files in os.walk(root):
        if CONFIG in files and ENVIRONMENT in files:
            below.clear()  # a run holds no runs
            runs.append(read_run(folder))
    return sorted(runs, key=lambda run: (str(run.environment.get("started", "")), str(run.path)))


def number(value: object) -> float | None:
    """Return a logged value as a finite float, or None for anything else ("nan", "inf", a text, nothing)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON integers have no bound, floats do
        return None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(_read_bytes(file))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{file}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or 'damaged'}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}:1: not YAML: {' '.join(str(error).split())}") from error
    return _mapping(value, file=file, line=1)


def _read_json(file: Path) -> dict[str, Any]:
    return _mapping(_parse(_read_bytes(file), file=file, line=1), file=file, line=1)


def _read_lines(file: Path) -> tuple[dict[str, Any], ...]:
    lines = _read_bytes(file).split(b"\n")
    unended = lines.pop()
    records = [_mapping(_parse(text, file=file, line=i), file=file, line=i) for i, text in enumerate(lines, start=1)]
    try:
        last = _parse(unended, file=file, line=len(lines) + 1)
    except ValueError:
        return tuple(records)
    # `12` may be the beginning of `123`, but an object ends with its brace: it is whole, only its newline is lost.
    return (*records, last) if isinstance(last, dict) else tuple(records)


def _parse(text: bytes, *, file: Path, line: int) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not strict JSON")

    try:
        return json.loads(text.decode(), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}:{line}: not JSON: {reason(error)}") from error


def _mapping(value: object, *, file: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{file}:{line}: holds a {type(value).__name__}, not names with values; was it edited?")
    return value


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {reason(error)}") from error
