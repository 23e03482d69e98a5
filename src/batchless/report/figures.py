"""The two figures of a page, from the numbers of the runs: accuracy by images per forward, and learning curves."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from batchless.report.chart import Axis, Chart, Line, Point, Style, draw, style, ticks
from batchless.report.table import Cell, Comparison
from batchless.runs import Run, number

POINTS = 120  # of one learning curve; more cannot be seen
Curve = list[tuple[float, float]]


def styles(comparison: Comparison) -> dict[str, Style]:
    """Return one look per normalizer, used in every figure and table of a page."""
    return {name: style(index) for index, name in enumerate(comparison.normalizers)}


def accuracy_chart(comparison: Comparison) -> Chart | None:
    """Return test accuracy against images per forward, with sd bars where n > 1; None if no run has an accuracy."""
    means = [cell for cell in comparison.cells if cell.mean is not None]
    if not means:
        return None
    looks = styles(comparison)
    lines = [_accuracy_line(comparison, name, looks[name]) for name in comparison.normalizers]
    low = min(point.y - point.spread for line in lines for point in line.points)
    high = max(point.y + point.spread for line in lines for point in line.points)
    crosses = any(line.absent for line in lines)
    return draw(
        lines,
        label="Test accuracy against images per forward, one line per normalizer",
        x=_sizes_axis(comparison.sizes),
        y=_percent_axis(low - (3 if crosses else 0), high),
        width=720,
        height=420,
        text=24,
        dodge=min(6.0, 30 / len(lines)) if any(cell.sd is not None for cell in means) else 0.0,
    )


def learning_charts(comparison: Comparison, runs: Sequence[Run]) -> tuple[str, dict[str, Chart]]:
    """Return what the curves show, and one chart per number of images per forward, by its caption.

    Test accuracy where at least one run was tested twice or more, otherwise the training loss; all charts have the
    same axes. No charts if there is neither.
    """
    curves = {id(run): _curve(run, kind="test", value="accuracy", factor=100.0) for run in runs}
    tested = any(len(curve) > 1 for curve in curves.values())
    if not tested:
        curves = {id(run): _curve(run, kind="train", value="loss") for run in runs}
    seen = [point for curve in curves.values() for point in curve]
    if not any(len(curve) > 1 for curve in curves.values()):
        return "", {}
    x = _images_axis(max(images for images, _ in seen))
    y = _percent_axis(min(v for _, v in seen), max(v for _, v in seen)) if tested else _loss_axis(curves)
    looks = styles(comparison)
    charts = {}
    for size in comparison.sizes:
        own = [run for run in runs if run.config["images_per_forward"] == size and curves[id(run)]]
        caption = "1 image per forward" if size == 1 else f"{size} images per forward"
        lines = [_learning_line(run, curves[id(run)], looks, unit=" %" if tested else "") for run in own]
        if lines:
            charts[caption] = draw(
                lines, label=f"Learning curves at {caption}", x=x, y=y, width=270, height=215, text=13
            )
    return ("test accuracy" if tested else "training loss"), charts


def _accuracy_line(comparison: Comparison, name: str, look: Style) -> Line:
    cells = [cell for size in comparison.sizes if (cell := comparison.cell(name, size)) is not None]
    return Line(
        style=look,
        points=tuple(
            Point(x=cell.images_per_forward, y=100 * cell.mean, spread=100 * (cell.sd or 0.0), title=_title(cell))
            for cell in cells
            if cell.mean is not None
        ),
        absent=tuple(
            Point(x=cell.images_per_forward, y=0.0, title=_title(cell)) for cell in cells if cell.mean is None
        ),
    )


def _title(cell: Cell) -> str:
    return f"{cell.normalizer}, images per forward {cell.images_per_forward}: {cell.text()}"


def _learning_line(run: Run, curve: Curve, looks: Mapping[str, Style], *, unit: str) -> Line:
    name = run.config["normalizer"]
    images, value = curve[-1]
    title = f"{name}, seed {run.config.get('seed', '?')}: {value:.4g}{unit} after {images:,.0f} images"
    *before, last = [Point(x=x, y=y) for x, y in curve]
    return Line(style=looks[name], points=(*before, Point(x=last.x, y=last.y, title=title)))


def _curve(run: Run, *, kind: str, value: str, factor: float = 1.0) -> Curve:
    points = [
        (images, factor * found)
        for record in run.metrics
        if record.get("kind") == kind
        and (images := number(record.get("images"))) is not None
        and (found := number(record.get(value))) is not None
    ]
    share = math.ceil(len(points) / POINTS)
    groups = (points[start : start + share] for start in range(0, len(points), max(share, 1)))
    return [(group[-1][0], fmean(y for _, y in group)) for group in groups]


def _sizes_axis(sizes: Sequence[int]) -> Axis:
    span = math.log2(sizes[-1] / sizes[0])
    close = {after for before, after in pairwise(sizes) if math.log2(after / before) < span / 16}
    return Axis(
        label="images per forward (micro-batch)",
        low=sizes[0],
        high=sizes[-1],
        ticks=tuple((size, "" if size in close else f"{size:,}") for size in sizes),
        scale=math.log2,
    )


def _percent_axis(low: float, high: float) -> Axis:
    short = max(0.0, 10.0 - (high - low)) / 2  # less than ten points on the whole axis makes a drama of noise
    at = [value for value in ticks(max(low - short, 0.0), min(high + short, 100.0)) if 0 <= value <= 100]
    return Axis(label="test accuracy, %", low=at[0], high=at[-1], ticks=tuple((value, f"{value:g}") for value in at))


def _loss_axis(curves: Mapping[int, Curve]) -> Axis:
    values = [value for curve in curves.values() for _, value in curve]
    # A run that diverges would press all others flat on the axis: it leaves the plot at the top instead.
    start = max(curve[0][1] for curve in curves.values() if curve)
    at = ticks(min(0.0, *values), min(max(values), 1.5 * start) if start > 0 else max(values))
    return Axis(label="training loss", low=at[0], high=at[-1], ticks=tuple((value, f"{value:g}") for value in at))


def _images_axis(most: float) -> Axis:
    at = [value for value in ticks(0.0, most, count=4) if value <= most]
    return Axis(label="images seen", low=0.0, high=most, ticks=tuple((value, _short(value)) for value in at))


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
