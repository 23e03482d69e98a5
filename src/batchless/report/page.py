"""One HTML page from run folders: self-contained, no network; its scripts are its own and run by their hash only."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchless.report import rows
from batchless.report.charts import Figure, accuracy_chart, learning_charts
from batchless.report.contents import Contents, gather
from batchless.report.facts import environment, facts
from batchless.report.pictures import KINDS
from batchless.report.style import Style, styles
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
        runs: at least one, see `comparison`.
        title: the heading.
        findings: sentences shown before the numbers, such as those of `claims`.
        commands: the exact commands that made the report.
        control: what all are compared with, see `choose_control`.

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

    contents = gather(runs, title=title, findings=findings, commands=commands, control=control)
    looks = styles(contents.table.normalizers)
    figures, panels = _figures(contents, looks)
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text("utf-8")] if figures else []
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html.j2").render(
        contents=contents,
        table=contents.table,
        styles=looks,
        rows=rows,
        kinds=KINDS,
        facts=facts(contents),
        figures=figures,
        panels=panels,
        environment=environment(runs),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
    )


def _figures(contents: Contents, looks: Mapping[str, Style]) -> tuple[dict[str, Figure], dict[str, str]]:
    """Return the charts by the id of their place on the page, and the captions of those with learning curves."""
    accuracy = accuracy_chart(contents.table, looks)
    figures = {} if accuracy is None else {"accuracy": accuracy}
    panels = {}
    if contents.learning is not None:
        charts = learning_charts(contents.learning, contents.runs, contents.table.sizes, looks)
        figures |= {f"learning-{size}": chart for size, chart in charts.items()}
        panels = {f"learning-{size}": _per_forward(size) for size in charts}
    return figures, panels


def _hash(script: str) -> str:
    """Return what the page's Content-Security-Policy calls a script by: any other script on it does not run."""
    assert "</script" not in script.lower(), "this script would end its own element"
    assert "\r" not in script, "a browser would read another script: it makes every line end a newline"
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _per_forward(size: int) -> str:
    return "1 image per forward" if size == 1 else f"{size:,} images per forward"
