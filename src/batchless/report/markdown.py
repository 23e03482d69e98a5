"""The report as Markdown: everything but the charts and the pictures."""

from collections.abc import Iterable, Sequence

from batchless.report import rows
from batchless.report.contents import Contents, gather
from batchless.report.escape import markdown_code, markdown_text
from batchless.runs import Run


def render_markdown(
    runs: Sequence[Run],
    *,
    title: str,
    findings: Sequence[str],
    commands: Sequence[str],
    control: str | None = None,
) -> str:
    """Return the comparison of `runs` as Markdown; the arguments are those of `write_page`."""
    contents = gather(runs, title=title, findings=findings, commands=commands, control=control)
    parts = [f"# {markdown_text(title)}"]
    if findings:
        parts += ["## Findings", _list(findings)]
    parts += ["## Test accuracy", contents.table.markdown().rstrip(), "## All numbers", _about(contents)]
    parts.append(_table(rows.NUMBERS, rows.number_rows(contents)))
    if contents.learning is not None:
        parts += [f"## Learning curves: {contents.learning.what}", _table(rows.CURVES, rows.curve_rows(contents))]
    if contents.varied or contents.conversions:
        parts.append("## Derived settings")
    if contents.varied:
        parts.append(_table(("setting", "value", "runs"), contents.varied))
    for conversion in contents.conversions:
        parts += [f"### {markdown_text(conversion.normalizer)}", _table(rows.LAYERS, rows.layer_rows(conversion))]
        parts += [_list(conversion.notes)] if conversion.notes else []
    parts += ["## Commands", *map(markdown_code, commands)]
    parts += [markdown_code(command) for command, _ in contents.recorded]
    parts += ["Every run can be repeated from its folder alone:", markdown_code(contents.repetition)]
    parts += ["## Every run", _table(rows.RUNS, rows.run_rows(contents))]
    if contents.notes:
        parts += ["## Missing or damaged files", _list(contents.notes)]
    return "\n\n".join(parts) + "\n"


def _about(contents: Contents) -> str:
    lacking = ", which has no accuracy" if contents.control.mean is None else ""
    return (
        f"The control is {markdown_text(contents.control_name)}{lacking}. Differences from it are in percentage points; "
        "each interval holds 95 % (paired by seed where both have the same seeds, otherwise Welch; one seed gives none)."
    )


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {markdown_text(line)}" for line in lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    drawn = [head, ["---"] * len(head), *(map(markdown_text, line) for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in drawn)
