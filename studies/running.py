"""What studies of cells have in common: which cells have ended, and the one file that keeps their figures."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from batchless.report.main_figure import main_figure
from batchless.runs import Run, read_run
from batchless.runs.atomic import write_text

KEEPING_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""For glibc: memory that is freed stays with the process. A round of AlexNet otherwise spends a third of its time on getting
pages back from the system (docs/log.md); it needs half as much memory again, and changes no bit."""

_WRITING = Lock()


def ended(folder: Path) -> bool:
    """Whether the run in `folder` has come to its end, and not by a failure."""
    summary = _summary(folder)
    return summary is not None and "failed" not in summary


def has_failed(folder: Path) -> bool:
    """Whether the run in `folder` said itself why it cannot go on, such as by a loss that is not finite."""
    return "failed" in (_summary(folder) or {})


def _summary(folder: Path) -> Mapping[str, Any] | None:
    return read_run(folder).summary if (folder / "config.yaml").exists() else None


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run_cell(name: str, words: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a cell's command in a process of its own, and return what it said of an error; empty without one.

    Args:
        name: the cell's.
        words: the command.
        environment: variables that the process has beside ours.
    """
    print(f"{name}: {'goes on' if '--resume' in words else 'started'}", flush=True)
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    return "" if done.returncode == 0 else done.stderr.strip()[-400:] or f"it ended with status {done.returncode}"


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
    print(f"{name}: {_told(run)}", flush=True)


def _told(run: Run) -> str:
    summary = run.summary or {}
    if "failed" in summary:
        return f"failed: {summary['failed']}"
    figure = main_figure(run)
    return f"{figure.word} {100 * summary[f'test_{figure.name}']:.1f} % in {summary['seconds']:.0f} s"
