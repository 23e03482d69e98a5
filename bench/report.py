"""Comparisons as tables of text, for the terminal and for the run folder, and what to say of a busy machine."""

import os
from collections.abc import Sequence

import numpy as np

from bench.timing import Comparison, Target, judge, ratio, spread


def load_average() -> float | None:
    """Processes that wanted to run, averaged over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def load_line(before: float | None, after: float | None) -> str:
    """The load average before and after in one line."""
    return f"load {_number(before)} before, {_number(after)} after"


def busy_warning(before: float | None, after: float | None, *, threads: int) -> str | None:
    """What to say if somebody else was computing, None otherwise."""
    loads = [load for load in (before, after) if load is not None]
    if not loads or max(loads) <= threads + 0.5:
        return None
    return (
        f"WARNING: the machine is busy (load {', then '.join(map(_number, loads))}, where {threads} of it may be ours): "
        "do not trust these times; run again when it is quiet"
    )


def comparison_lines(comparison: Comparison) -> list[str]:
    """The tables of the comparison, one below the other, and its notes."""
    lines = [_title(comparison)]
    for table in comparison_tables(comparison):
        lines += ["", *_aligned(table)]
    return [*lines, "", *comparison.notes] if comparison.notes else lines


def comparison_tables(comparison: Comparison) -> list[list[tuple[str, ...]]]:
    """The contestants, and where there are any the targets with their verdicts; the first row of a table is its head."""
    tables = [[_header(comparison), *(_row(comparison, name) for name in comparison.times)]]
    targets = [_target_row(comparison, target) for target in comparison.targets]
    targets += [_byte_target_row(comparison, target) for target in comparison.byte_targets]
    return [*tables, [_TARGETS, *targets]] if targets else tables


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """All raw times, and the tables as they are shown."""
    return {
        "title": _title(comparison),
        "tables": comparison_tables(comparison),
        "notes": list(comparison.notes),
        "base": comparison.base,
        "seconds": {name: list(seconds) for name, seconds in comparison.times.items()},
        "bytes_moved": dict(comparison.bytes_moved),
        "saved_bytes": dict(comparison.saved_bytes),
        "items": comparison.items,
    }


def _title(comparison: Comparison) -> str:
    return f"{comparison.title} ({len(comparison.times[comparison.base])} rounds)"


_TARGETS = ("target", "of minima", "paired", "95 %", "verdict")


def _header(comparison: Comparison) -> tuple[str, ...]:
    columns = ("", "min ms", "median ms", "spread", "x min", "x paired", "95 %")
    columns += ("GB/s",) if comparison.bytes_moved else ()
    columns += ("images/s",) if comparison.items else ()
    return (*columns, "saved MiB", "of base") if comparison.saved_bytes else columns


def _row(comparison: Comparison, name: str) -> tuple[str, ...]:
    seconds = comparison.times[name]
    median = float(np.median(seconds))
    row: tuple[str, ...] = (name, f"{1e3 * min(seconds):.1f}", f"{1e3 * median:.1f}", f"{spread(seconds):.0%}")
    if name == comparison.base:
        row += ("1", "1", "base")
    else:
        measured = ratio(comparison.times, name, comparison.base)
        row += (f"{measured.minima:.3f}", f"{measured.paired:.3f}", f"{measured.low:.3f}..{measured.high:.3f}")
    if comparison.bytes_moved:
        row += (f"{comparison.bytes_moved[name] / median / 1e9:.1f}",)
    if comparison.items:
        row += (f"{comparison.items / median:.1f}",)
    if comparison.saved_bytes:
        saved, base = comparison.saved_bytes[name], comparison.saved_bytes[comparison.base]
        row += (f"{saved / 2**20:.1f}", f"{saved / base:.3f}")
    return row


def _target_row(comparison: Comparison, target: Target) -> tuple[str, ...]:
    measured = ratio(comparison.times, target.of, target.base)
    return (
        f"{target.of} <= {target.at_most:.3g} x {target.base}",
        f"{measured.minima:.3f}",
        f"{measured.paired:.3f}",
        f"{measured.low:.3f}..{measured.high:.3f}",
        judge(target, measured),
    )


def _byte_target_row(comparison: Comparison, target: Target) -> tuple[str, ...]:
    share = comparison.saved_bytes[target.of] / comparison.saved_bytes[target.base]
    verdict = "met" if share <= target.at_most else "missed"
    return (f"bytes of {target.of} <= {target.at_most:.3g} x {target.base}", f"{share:.3f}", "", "exact", verdict)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(load: float | None) -> str:
    return "unknown" if load is None else f"{load:.2f}"
