"""The numbers of federated runs as texts, row by row: what the HTML page and the Markdown have in common."""

from collections.abc import Mapping, Sequence

from batchless.report.difference import Difference
from batchless.report.federated_contents import FederatedContents
from batchless.report.federated_curves import curve
from batchless.report.federated_partition import Partition
from batchless.report.federated_table import MEAN, Method, Moment
from batchless.report.rows import difference_texts, result
from batchless.runs import number

NUMBERS = (
    "method",
    "last round, %",
    "sd",
    "chosen round, %",
    "sd",
    "n",
    "difference, points",
    "95 % interval",
    "interval by",
    "images",
    "communicated",
    "clients left out",
    "seconds",
)
RUNS = (
    "folder",
    "method",
    "seed",
    "result",
    "rounds",
    "chosen round",
    "images seen",
    "communicated",
    "left out",
    "seconds",
)
CURVES = ("method", "seed", "tests", "first", "best", "last")
CONVERGENCE = ("method", "runs that got there", "rounds", "images", "communicated")
PRIVACY = ("method", "seed", "protected", "clipped to", "noise multiplier", "epsilon", "delta")
LEFT_OUT = ("method", "seed", "client", "reason", "rounds")
HOLDERS = ("domain", "clients", "training images per client", "classes per client", "validation images", "test images")


def number_rows(contents: FederatedContents) -> list[tuple[str, ...]]:
    """Return one row of `NUMBERS` per method, of the mean over the domains."""
    rows: list[tuple[str, ...]] = []
    for method in contents.table.methods:
        last, chosen = method.score(), method.score(moment="chosen")
        rows.append(
            (
                method.name,
                _percent(last.mean),
                _percent(last.sd),
                _percent(chosen.mean),
                _percent(chosen.sd),
                str(last.n),
                *difference_texts(
                    contents.differences.get((method.name, "last", MEAN)), control=contents.is_control(method)
                ),
                _count(method.figure("images")),
                data_size(method.figure("bytes")),
                str(method.left_out()),
                _count(method.figure("seconds")),
            )
        )
    return rows


def difference_cell(contents: FederatedContents, method: Method, moment: Moment, column: str) -> tuple[str, str, str]:
    """Return a cell of the table of differences: the value, its interval, and how that was found."""
    return difference_texts(
        contents.differences.get((method.name, moment, column)), control=contents.is_control(method)
    )


def difference_rows(contents: FederatedContents, moment: Moment) -> list[tuple[str, ...]]:
    """Return one row per method: its difference from the control in each column, with its interval."""
    return [
        (
            method.name,
            *(_said(contents.differences.get((method.name, moment, column))) for column in contents.table.columns),
        )
        for method in contents.table.methods
        if not contents.is_control(method)
    ]


def run_rows(contents: FederatedContents) -> list[tuple[str, ...]]:
    """Return one row of `RUNS` per run."""
    rows: list[tuple[str, ...]] = []
    for method in contents.table.methods:
        for run in method.runs:
            summary = run.summary or {}
            done = [number(record.get("round")) for record in run.metrics if record.get("kind") == "round"]
            rows.append(
                (
                    str(run.path),
                    method.name,
                    str(run.config.get("seed", "")),
                    result(run),
                    _count(max((found for found in done if found is not None), default=None)),
                    _count(number(summary.get("chosen_round"))),
                    _count(number(summary.get("images"))),
                    data_size(number(summary.get("bytes"))),
                    _count(number(summary.get("left_out"))),
                    _count(number(summary.get("seconds"))),
                )
            )
    return rows


def curve_rows(contents: FederatedContents) -> list[tuple[str, ...]]:
    """Return one row of `CURVES` per run that was tested, of the mean over the domains."""
    return [
        (
            method.name,
            str(run.config.get("seed", "")),
            str(len(points)),
            *(
                f"{point.percent:.4g} % after round {point.rounds:,.0f}"
                for point in (points[0], max(points, key=lambda point: point.percent), points[-1])
            ),
        )
        for method in contents.table.methods
        for run in method.runs
        if (points := curve(run))
    ]


def convergence_rows(contents: FederatedContents) -> list[tuple[str, ...]]:
    """Return one row of `CONVERGENCE` per method that was tested: means over the runs that got there."""
    return [
        (
            one.method,
            f"{len(one.reached)} of {one.runs}",
            _count(one.average("rounds")),
            _count(one.average("images")),
            data_size(one.average("bytes")),
        )
        for one in contents.convergence
    ]


def privacy_rows(contents: FederatedContents) -> list[tuple[str, ...]]:
    """Return one row of `PRIVACY` per run with differential privacy, as far as it has come."""
    rows: list[tuple[str, ...]] = []
    for method in contents.table.methods:
        for run in method.runs:
            privacy = run.config.get("privacy")
            if not isinstance(privacy, Mapping) or privacy.get("level") not in ("client", "sample"):
                continue
            told = [number(line.get("epsilon")) for line in run.metrics if line.get("kind") == "round"]
            spent = next((value for value in reversed(told) if value is not None), None)
            rows.append(
                (
                    method.name,
                    str(run.config.get("seed", "")),
                    "clients" if privacy["level"] == "client" else "images",
                    *(f"{number(privacy.get(key)) or 0.0:g}" for key in ("clip_norm", "noise_multiplier")),
                    "none given" if spent is None else f"{spent:.3g}",
                    f"{number(privacy.get('delta')) or 0.0:g}",
                )
            )
    return rows


def left_out_rows(contents: FederatedContents) -> list[tuple[str, ...]]:
    """Return one row of `LEFT_OUT` per client and reason."""
    return [(*who, ", ".join(rounds)) for *who, rounds in contents.left_out]


def holder_rows(partition: Partition) -> list[tuple[str, ...]]:
    """Return one row of `HOLDERS` per domain, those without clients too."""
    tests = dict(partition.tests)
    rows: list[tuple[str, ...]] = []
    for domain in dict.fromkeys([*tests, *partition.domains]):
        own = [holder for holder in partition.holders if holder.domain == domain]
        rows.append(
            (
                domain,
                str(len(own)) if own else "0 (unseen)" if domain in partition.unseen else "with other domains",
                _range([sum(holder.counts) for holder in own]),
                _range([sum(count > 0 for count in holder.counts) for holder in own]),
                f"{sum(holder.validation for holder in own):,}",
                f"{tests[domain]:,}" if domain in tests else "",
            )
        )
    return rows


def data_size(size: float | None) -> str:
    """Return a number of bytes in the decimal units of networks.

    >>> data_size(56_880_000.0)
    '56.9 MB'
    """
    if size is None:
        return ""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def _said(difference: Difference | None) -> str:
    value, interval, how = difference_texts(difference, control=False)
    return f"{value} ({interval or how})" if value else "-"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _count(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _range(values: Sequence[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
