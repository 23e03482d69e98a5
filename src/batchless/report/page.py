"""One HTML page from run folders: self-contained, no network; its scripts are its own and run by their hash only."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchless.report import federated_rows, rows
from batchless.report.charts import accuracy_chart, learning_charts
from batchless.report.contents import Contents
from batchless.report.facts import environment, facts
from batchless.report.federated_charts import PER, curve_charts, domains_chart, partition_chart
from batchless.report.federated_contents import FederatedContents
from batchless.report.federated_table import MEAN, MOMENTS
from batchless.report.gather import gather
from batchless.report.pictures import KINDS
from batchless.report.style import styles
from batchless.runs import Run
from batchless.runs.atomic import reason, write_text

HERE = Path(__file__).parent


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    *,
    title: str,
    findings: Sequence[str],
    commands: Sequence[str],
    control: str | None = None,
) -> None:
    """Write the comparison of `runs` as one HTML page, atomically.

    Args:
        path: the file; missing folders are made.
        runs: at least one, see `comparison` and `federated_comparison`; each kind is compared among itself.
        title: the heading.
        findings: sentences shown before the numbers, such as those of `claims`.
        commands: the exact commands that made the report.
        control: what all are compared with, see `choose_control` and `choose_method`.

    Raises:
        ValueError: the runs cannot be compared, or the file cannot be written.
    """
    path = Path(path)
    text = render_page(runs, title=title, findings=findings, commands=commands, control=control)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path.parent} for the page: {reason(error)}") from error
    write_text(path, text)


def render_page(
    runs: Sequence[Run],
    *,
    title: str,
    findings: Sequence[str],
    commands: Sequence[str],
    control: str | None = None,
) -> str:
    """Return the page as text; see `write_page`."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    report = gather(runs, title=title, findings=findings, commands=commands, control=control)
    halves = [] if report.trained is None else [_trained(report.trained)]
    if report.federated is not None:
        taken = 0 if report.trained is None else len(report.trained.table.normalizers)
        halves.append(_federated(report.federated, first_style=taken))
    figures = {name: figure for half in halves for name, figure in half["figures"].items()}
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text("utf-8")] if figures else []
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html.j2").render(
        report=report,
        halves=halves,
        rows=rows,
        kinds=KINDS,
        figures=figures,
        environment=environment(runs),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
    )


def _trained(contents: Contents) -> dict[str, Any]:
    """Return what the template needs of runs of `batchless train`: charts by the id of their place, captions of panels."""
    looks = styles(contents.table.normalizers)
    accuracy = accuracy_chart(contents.table, looks)
    figures = {} if accuracy is None else {"accuracy": accuracy}
    panels = {}
    if contents.learning is not None:
        charts = learning_charts(contents.learning, contents.runs, contents.table.sizes, looks)
        figures |= {f"learning-{size}": chart for size, chart in charts.items()}
        panels = {f"learning-{size}": _per_forward(size) for size in charts}
    return {
        "template": "trained.html.j2",
        "title": "Few images per forward",
        "word": "",
        "federated": False,
        "contents": contents,
        "facts": facts(contents),
        "styles": looks,
        "rows": rows,
        "figures": figures,
        "panels": panels,
    }


def _federated(contents: FederatedContents, *, first_style: int) -> dict[str, Any]:
    """Return the same of runs of `batchless federate`."""
    looks = styles([method.name for method in contents.table.methods], first=first_style)
    accuracy = domains_chart(contents.table, looks)
    curves = {
        f"curve-{place}": (column, chart)
        for place, (column, chart) in enumerate(curve_charts(contents.table, looks).items())
    }
    pictures = {f"partition-{place}": partition_chart(partition) for place, partition in enumerate(contents.partitions)}
    drawn = {} if accuracy is None else {"domains": accuracy}
    return {
        "template": "federated.html.j2",
        "title": "Federated learning",
        "word": "federated ",
        "federated": True,
        "contents": contents,
        "facts": facts(contents),
        "styles": looks,
        "rows": federated_rows,
        "moments": MOMENTS,
        "accuracy": "domains" if drawn else "",
        "figures": drawn | {place: chart for place, (_, chart) in curves.items()} | pictures,
        "panels": {
            place: "mean over the domains" if column == MEAN else column for place, (column, _) in curves.items()
        },
        "across": list(next(iter(curves.values()))[1]["across"]) if curves else [],
        "per": PER,
        "pictures": list(pictures),
    }


def _hash(script: str) -> str:
    """Return what the page's Content-Security-Policy calls a script by: any other script on it does not run."""
    assert "</script" not in script.lower(), "this script would end its own element"
    assert "\r" not in script, "a browser would read another script: it makes every line end a newline"
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _per_forward(size: int) -> str:
    return "1 image per forward" if size == 1 else f"{size:,} images per forward"
