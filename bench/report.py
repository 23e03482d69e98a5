"""Comparisons as text for the terminal and as values for JSON, with the machine they were measured on."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from bench.timing import Comparison, Target, judge, ratio, spread


def load_average() -> float | None:
    """Processes that wanted to run, averaged over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def machine_line(machine: Mapping[str, object]) -> str:
    """The machine in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads used, "
        f"torch {machine['torch']}, timm {machine['timm']}"
    )


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
    """The table, and below it one line for each target."""
    rounds = len(comparison.times[comparison.base])
    rows = [_header(comparison), *(_row(comparison, name) for name in comparison.times)]
    lines = [f"{comparison.title} ({rounds} rounds)", "", *_aligned(rows)]
    if comparison.targets:
        lines += ["", *_aligned([_target_row(comparison, target) for target in comparison.targets])]
    return [*lines, "", *comparison.notes] if comparison.notes else lines


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """All raw times, and the ratios of the targets."""
    return {
        "title": comparison.title,
        "base": comparison.base,
        "seconds": {name: list(seconds) for name, seconds in comparison.times.items()},
        "bytes_moved": dict(comparison.bytes_moved),
        "saved_bytes": dict(comparison.saved_bytes),
        "items": comparison.items,
        "notes": list(comparison.notes),
        "targets": [
            {
                **dataclasses.asdict(target),
                **dataclasses.asdict(measured := ratio(comparison.times, target.of, target.base)),
                "verdict": judge(target, measured),
            }
            for target in comparison.targets
        ],
    }


def _header(comparison: Comparison) -> tuple[str, ...]:
    columns = ("", "min ms", "median ms", "spread", "x min", "x median", "95 %")
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
        row += (f"{measured.minima:.3f}", f"{measured.medians:.3f}", f"{measured.low:.3f}..{measured.high:.3f}")
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
        f"target: {target.of} <= {target.at_most:.3g} x {target.base}",
        f"{measured.minima:.3f} of minima,",
        f"{measured.medians:.3f} ({measured.low:.3f}..{measured.high:.3f}) of medians:",
        judge(target, measured),
    )


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
