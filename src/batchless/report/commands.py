"""How the runs were started, as far as it can be typed again."""

import shlex
from collections import Counter
from collections.abc import Sequence

from batchless.report.timings import is_bench
from batchless.runs import Run


def recorded_commands(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """Return the command lines that the run folders hold, each once, and how many runs it made.

    Left out are those of worker processes, which only the process that started them can give.
    """
    commands = Counter(str(run.environment["command"]) for run in runs if run.environment.get("command"))
    return [(command, count) for command, count in commands.items() if not _is_worker(command)]


def repetition(run: Run) -> str:
    """Return the command that repeats a run from its configuration, a benchmark from the repository's root."""
    again = shlex.quote(f"{run.path}-again")
    if is_bench(run):
        options = [f"--{key} {value}" for key, value in run.config.items() if key not in ("kind", "benchmark")]
        return " ".join(["python -m bench", str(run.config.get("benchmark")), *options, "--out", again])
    config = run.path / "config.yaml"
    verb = "federate" if is_federated(run) else "train"
    return f"batchless {verb} --config {shlex.quote(str(config))} --out {again}"


def is_federated(run: Run) -> bool:
    """Whether `batchless federate` made the run."""
    return run.config.get("kind") == "federate"


def _is_worker(command: str) -> bool:
    """Whether Python's multiprocessing made the command, with file descriptors in it."""
    try:
        return "--multiprocessing-fork" in shlex.split(command)
    except ValueError:
        return False
