"""What was compared, on which machine: the few lines that hold for all runs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batchless.report.contents import Contents
from batchless.report.federated_contents import FederatedContents
from batchless.runs import Run, number


def facts(contents: Contents | FederatedContents) -> list[tuple[str, str]]:
    """Return what holds for the whole comparison, by name."""
    runs, shared = contents.runs, contents.table.shared
    if isinstance(contents, FederatedContents):
        clients = {len(partition.holders) for partition in contents.partitions}
        federation = [
            ("domains", len(contents.table.domains)),
            ("clients", clients.pop() if len(clients) == 1 else None),
            ("rounds", shared.get("rounds")),
            ("local epochs", shared.get("local_epochs")),
        ]
    else:
        federation = []
    budget = {run.summary.get("images") for run in runs if run.summary is not None and "failed" not in run.summary}
    seen = number(next(iter(budget))) if len(budget) == 1 else None
    told = [
        ("model", shared.get("model")),
        *federation,
        ("images per optimizer step", shared.get("images_per_step")),
        ("images seen by each run", None if seen is None else f"{seen:,.0f}"),
        ("runs", len(runs)),
        ("seeds", _join(run.config.get("seed") for run in runs)),
        ("control", contents.control_name),
    ]
    return [(name, str(value)) for name, value in told if value is not None]


def environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return every key of the environments once with all its values; what belongs to single runs is among the details."""
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    shown = [key for key in keys if key not in ("command", "seed", "started", "git_commit", "git_dirty")]
    told = [(key.replace("_", " "), _join(run.environment.get(key) for run in runs)) for key in shown]
    told.append(("git commit", _join(_commit(run.environment) for run in runs)))
    started = sorted(_minute(run.environment["started"]) for run in runs if "started" in run.environment)
    if started:
        told.append(("started", started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"))
    return [(key, value) for key, value in told if value != "unknown"]


def _commit(environment: Mapping[str, Any]) -> str | None:
    commit = environment.get("git_commit")
    return f"{commit}, with changes" if commit and environment.get("git_dirty") else commit


def _minute(started: object) -> str:
    text = str(started)
    return f"{text[:10]} {text[11:16]} UTC" if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d.*\+00:00", text) else text


def _join(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values))
