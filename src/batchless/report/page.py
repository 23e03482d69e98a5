"""One HTML page from run folders: self-contained, no network, no scripts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchless.report.chart import CROSS
from batchless.report.figures import accuracy_chart, learning_charts, styles
from batchless.report.table import Comparison, comparison
from batchless.runs import Run, number
from batchless.runs.atomic import reason, write_text


def write_page(
    path: str | Path, runs: Sequence[Run], *, title: str, findings: Sequence[str], commands: Sequence[str]
) -> None:
    """Write the comparison of `runs` as one HTML page, atomically.

    Args:
        path: the file; missing folders are made.
        runs: at least one, see `comparison`.
        title: the heading.
        findings: sentences shown before the numbers, such as those of `claims`.
        commands: the exact commands that made the runs.

    Raises:
        ValueError: the runs cannot be compared, or the file cannot be written.
    """
    path = Path(path)
    text = render_page(runs, title=title, findings=findings, commands=commands)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path.parent} for the page: {reason(error)}") from error
    write_text(path, text)


def render_page(runs: Sequence[Run], *, title: str, findings: Sequence[str], commands: Sequence[str]) -> str:
    """Return the page as text; see `write_page`."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    table = comparison(runs)
    curves, learning = learning_charts(table, runs)
    return templates.get_template("page.html.j2").render(
        title=title,
        findings=findings,
        commands=commands,
        table=table,
        styles=styles(table),
        facts=_facts(table, runs),
        accuracy=accuracy_chart(table),
        bars=any(cell.sd is not None for cell in table.cells),
        crosses=any(cell.mean is None for cell in table.cells),
        curves=curves,
        learning=learning,
        speeds=any(cell.speed is not None for cell in table.cells),
        cross=CROSS,
        environment=_environment(runs),
        rows=[_row(run) for run in runs],
    )


def _facts(table: Comparison, runs: Sequence[Run]) -> list[tuple[str, str]]:
    budget = {run.summary.get("images") for run in runs if run.summary is not None and "failed" not in run.summary}
    seen = number(next(iter(budget))) if len(budget) == 1 else None
    facts = [
        ("model", table.shared.get("model")),
        ("images per optimizer step", table.shared.get("images_per_step")),
        ("images seen by each run", None if seen is None else f"{seen:,.0f}"),
        ("runs", len(runs)),
        ("seeds", _join(run.config.get("seed") for run in runs)),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """List every key once with all its values; what belongs to single runs is among the details."""
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    shown = [key for key in keys if key not in ("command", "seed", "started", "git_commit", "git_dirty")]
    rows = [(key.replace("_", " "), _join(run.environment.get(key) for run in runs)) for key in shown]
    rows.append(("git commit", _join(_commit(run.environment) for run in runs)))
    started = sorted(_minute(run.environment["started"]) for run in runs if "started" in run.environment)
    if started:
        rows.append(("started", started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"))
    return [(key, value) for key, value in rows if value != "unknown"]


def _commit(environment: Mapping[str, Any]) -> str | None:
    commit = environment.get("git_commit")
    return f"{commit}, with changes" if commit and environment.get("git_dirty") else commit


def _minute(started: object) -> str:
    text = str(started)
    return f"{text[:10]} {text[11:16]} UTC" if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d.*\+00:00", text) else text


def _row(run: Run) -> tuple[str, ...]:
    summary = run.summary if run.summary is not None else {"failed": "not finished"}
    accuracy, images, seconds = (number(summary.get(key)) for key in ("test_accuracy", "images", "seconds"))
    reached = "no accuracy" if accuracy is None else f"{100 * accuracy:.2f} %"
    return (
        str(run.path),
        str(run.config["normalizer"]),
        str(run.config["images_per_forward"]),
        str(run.config.get("seed", "")),
        str(summary.get("failed", reached)),
        "" if images is None else f"{images:,.0f}",
        "" if seconds is None else f"{seconds:,.1f}",
    )


def _join(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values))
