"""What studies of cells have in common: which cells have ended, and the one file that keeps their figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from batchless.runs import read_run
from batchless.runs.atomic import write_text

_WRITING = Lock()


def ended(folder: Path) -> bool:
    """Whether the run in `folder` has come to its end, and not by a failure."""
    summary = read_run(folder).summary if (folder / "config.yaml").exists() else None
    return summary is not None and "failed" not in summary


def kept(results: Path) -> dict[str, Any]:
    """What is kept, by cell; nothing before the first one."""
    return dict(json.loads(results.read_text())) if results.exists() else {}


def keep(results: Path, name: str, record: dict[str, Any]) -> None:
    """Add a cell's figures, or put them in place of its earlier ones; the file is whole at every moment."""
    with _WRITING:
        results.parent.mkdir(parents=True, exist_ok=True)
        write_text(results, json.dumps(kept(results) | {name: record}, indent=1, sort_keys=True) + "\n")


def keep_run(results: Path, name: str, folder: Path, about: Mapping[str, Any]) -> None:
    """Keep the figures of the run in `folder` as a cell's, with what the study says about it, and tell of them."""
    run = read_run(folder)
    summary = run.summary or {}
    record = dict(about) | {
        "normalizer": run.config["normalizer"],
        "summary": summary,
        "tests": [line for line in run.metrics if line.get("kind") == "test"],
        "machine": {key: value for key, value in run.environment.items() if key != "command"},
    }
    keep(results, name, record)
    print(f"{name}: {100 * summary['test_accuracy']:.1f} % in {summary['seconds']:.0f} s", flush=True)
