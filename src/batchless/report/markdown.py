"""The report as Markdown: everything but the charts and the pictures."""

from collections.abc import Iterable, Sequence

from batchless.report import federated_rows, rows
from batchless.report.contents import Contents
from batchless.report.escape import markdown_code, markdown_table, markdown_text
from batchless.report.federated_contents import FederatedContents
from batchless.report.federated_table import MOMENTS
from batchless.report.gather import gather
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
    report = gather(runs, title=title, findings=findings, commands=commands, control=control)
    parts = [f"# {markdown_text(title)}"]
    if findings:
        parts += ["## Findings", _list(findings)]
    if report.trained is not None:
        parts += _trained(report.trained)
    if report.federated is not None:
        parts += _federated(report.federated)
    parts += [benchmark.markdown().rstrip() for benchmark in report.benchmarks]
    for half in report.halves:
        parts += _derived(half)
    parts += ["## Commands", *map(markdown_code, commands)]
    parts += [markdown_code(command) for command, _ in report.recorded]
    parts += ["Every run can be repeated from its folder alone:", markdown_code(report.repetition)]
    if report.trained is not None:
        parts += ["## Every run", markdown_table(rows.RUNS, rows.run_rows(report.trained))]
    if report.federated is not None:
        parts += [
            "## Every federated run",
            markdown_table(federated_rows.RUNS, federated_rows.run_rows(report.federated)),
        ]
    if report.notes:
        parts += ["## Missing or damaged files", _list(report.notes)]
    return "\n\n".join(parts) + "\n"


def _trained(contents: Contents) -> list[str]:
    parts = [
        f"## T{contents.table.figure.title[1:]}",
        contents.table.markdown().rstrip(),
        "## All numbers",
        _about(contents),
    ]
    parts.append(markdown_table(rows.numbers_head(contents), rows.number_rows(contents)))
    if contents.learning is not None:
        parts += [
            f"## Learning curves: {contents.learning.what}",
            markdown_table(rows.CURVES, rows.curve_rows(contents)),
        ]
    return parts


def _federated(contents: FederatedContents) -> list[str]:
    parts = ["## Test accuracy by method and domain", contents.table.markdown().rstrip()]
    if contents.unseen is not None:
        parts += ["## Leave-one-domain-out", contents.unseen.markdown().rstrip()]
    parts += ["## All numbers, mean over the domains", _about(contents)]
    parts.append(markdown_table(federated_rows.NUMBERS, federated_rows.number_rows(contents)))
    for moment in contents.table.moments:
        head = (f"difference, points, {MOMENTS[moment]}", *contents.table.columns)
        parts.append(markdown_table(head, federated_rows.difference_rows(contents, moment)))
    if contents.convergence:
        parts += ["## Convergence", markdown_text(contents.level_text)]
        parts.append(markdown_table(federated_rows.CONVERGENCE, federated_rows.convergence_rows(contents)))
        parts.append(markdown_table(federated_rows.CURVES, federated_rows.curve_rows(contents)))
    if privacy := federated_rows.privacy_rows(contents):
        parts += ["## Differential privacy", markdown_table(federated_rows.PRIVACY, privacy)]
    if contents.left_out:
        parts += [
            "## Clients left out",
            markdown_table(federated_rows.LEFT_OUT, federated_rows.left_out_rows(contents)),
        ]
    for partition in contents.partitions:
        parts += [f"## Partition: {markdown_text(partition.title)}"]
        parts.append(markdown_table(federated_rows.HOLDERS, federated_rows.holder_rows(partition)))
    return parts


def _derived(contents: Contents | FederatedContents) -> list[str]:
    parts = ["## Derived settings"] if contents.varied or contents.conversions else []
    if contents.varied:
        parts.append(markdown_table(("setting", "value", "runs"), contents.varied))
    for conversion in contents.conversions:
        parts += [
            f"### {markdown_text(conversion.normalizer)}",
            markdown_table(rows.LAYERS, rows.layer_rows(conversion)),
        ]
        parts += [_list(conversion.notes)] if conversion.notes else []
    return parts


def _about(contents: Contents | FederatedContents) -> str:
    lacking = "" if contents.control_has_accuracy else ", which has no accuracy"
    return (
        f"The control is {markdown_text(contents.control_name)}{lacking}. Differences from it are in percentage points; "
        "each interval holds 95 % (paired by seed where both have the same seeds, otherwise Welch; one seed gives none)."
        f"{f' {contents.control_note}' if isinstance(contents, FederatedContents) and contents.control_note else ''}"
    )


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {markdown_text(line)}" for line in lines)
