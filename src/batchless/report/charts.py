"""The charts of a page, as the JSON that plotly draws; a colour such as `--c0` is one of the style sheet's variables."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from batchless.report.curves import Curve, LearningCurves
from batchless.report.figure import Figure, base_layout, folded, line_trace, percent_range
from batchless.report.style import Style
from batchless.report.table import Cell, Comparison
from batchless.runs import Run


def accuracy_chart(comparison: Comparison, looks: Mapping[str, Style]) -> Figure | None:
    """Return test accuracy against images per forward, with sd bars where n > 1; None if no run has an accuracy.

    The horizontal axis counts doublings; combinations without an accuracy are crosses at the foot.
    """
    means = [(100 * cell.mean, 100 * (cell.sd or 0.0)) for cell in comparison.cells if cell.mean is not None]
    if not means:
        return None
    crossed = [name for name in comparison.normalizers if _lacking(comparison, name)]
    span = max(math.log2(comparison.sizes[-1] / comparison.sizes[0]), 1.0)
    low, high = percent_range(min(mean - sd for mean, sd in means), max(mean + sd for mean, sd in means))
    low -= 0.08 * (high - low) if crossed else 0.0
    apart = span / 80 if any(sd for _, sd in means) else 0.0  # so that error bars do not hide each other
    traces = []
    for position, name in enumerate(comparison.normalizers):
        shift = apart * (position - (len(comparison.normalizers) - 1) / 2)
        traces.append(_means(comparison, looks[name], name, shift=shift))
        if name in crossed:
            shift = span / 45 * (crossed.index(name) - (len(crossed) - 1) / 2)
            traces.append(_crosses(comparison, looks[name], name, shift=shift, foot=low + 0.035 * (high - low)))
    first, last = math.log2(comparison.sizes[0]), math.log2(comparison.sizes[-1])
    middle, reach = (first + last) / 2, 0.56 * span
    layout = base_layout(f"{comparison.figure.title}, %", height=420)
    layout["xaxis"] |= {
        "range": [middle - reach, middle + reach],
        "tickvals": [math.log2(size) for size in comparison.sizes],
        "ticktext": _size_labels(comparison.sizes),
        "title": {"text": "images per forward (micro-batch)", "font": {"color": "--soft", "size": 13}},
    }
    layout["yaxis"] |= {"range": [low, high]}
    return {"data": traces, "layout": layout}


def learning_charts(
    learning: LearningCurves, runs: Sequence[Run], sizes: Sequence[int], looks: Mapping[str, Style]
) -> dict[int, Figure]:
    """Return one chart per number of images per forward that has a curve, one line per run; the axes are all the same."""
    seen = [point for curve in learning.curves for point in curve]
    most = max(images for images, _ in seen)
    values = [value for _, value in seen]
    if learning.tested:
        low, high = percent_range(min(values), max(values))
    else:
        low, high = _loss_range(learning.curves, values)
    charts = {}
    for size in sizes:
        traces = [
            _learning(run, curve, looks[run.config["normalizer"]], unit=learning.unit)
            for run, curve in zip(runs, learning.curves, strict=True)
            if curve and run.config["images_per_forward"] == size
        ]
        if traces:
            layout = base_layout(f"{learning.what}{',' if learning.unit else ''}{learning.unit}", height=240)
            layout["xaxis"] |= {"range": [-0.03 * most, 1.05 * most], "tickformat": "~s", "nticks": 5}
            layout["xaxis"] |= {"title": {"text": "images seen", "font": {"color": "--soft", "size": 12}}}
            layout["yaxis"] |= {"range": [low, high], "nticks": 6}
            charts[size] = {"data": traces, "layout": layout}
    return charts


def _lacking(comparison: Comparison, name: str) -> list[Cell]:
    return [cell for cell in comparison.cells if cell.normalizer == name and cell.mean is None]


def _means(comparison: Comparison, look: Style, name: str, *, shift: float) -> dict[str, Any]:
    cells = [cell for cell in comparison.cells if cell.normalizer == name and cell.mean is not None]
    spread = [100 * (cell.sd or 0.0) for cell in cells]
    colour = f"--c{look.colour}"
    trace = line_trace(look, name) | {
        "mode": "lines+markers",
        "x": [math.log2(cell.images_per_forward) + shift for cell in cells],
        "y": [100 * (cell.mean or 0.0) for cell in cells],
        "text": [_cell_label(cell) for cell in cells],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": look.symbol, "size": 9, "color": colour, "line": {"width": 1, "color": "--page"}},
    }
    if any(spread):
        trace["error_y"] = {"type": "data", "array": spread, "color": colour, "thickness": 1.25, "width": 3}
    return trace


def _crosses(comparison: Comparison, look: Style, name: str, *, shift: float, foot: float) -> dict[str, Any]:
    cells = _lacking(comparison, name)
    return line_trace(look, name) | {
        "mode": "markers",
        "x": [math.log2(cell.images_per_forward) + shift for cell in cells],
        "y": [foot] * len(cells),
        "text": [_cell_label(cell) for cell in cells],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": "x-thin", "size": 8, "line": {"width": 2.5, "color": f"--c{look.colour}"}},
    }


def _learning(run: Run, curve: Curve, look: Style, *, unit: str) -> dict[str, Any]:
    name = run.config["normalizer"]
    colour = f"--c{look.colour}"
    return line_trace(look, name) | {
        "mode": "lines+markers",
        "x": [images for images, _ in curve],
        "y": [value for _, value in curve],
        "text": folded(f"{name}, seed {run.config.get('seed', '?')}"),
        "hovertemplate": f"%{{data.text}}<br>%{{y:.4~g}}{unit} after %{{x:,}} images<extra></extra>",
        # The end alone is marked: it tells lines apart that share a colour.
        "marker": {
            "symbol": look.symbol,
            "size": [0] * (len(curve) - 1) + [8],
            "opacity": 1,
            "color": colour,
            "line": {"width": 0},
        },
    }


def _cell_label(cell: Cell) -> str:
    size = cell.images_per_forward
    head = f"{cell.normalizer}, {size:,} {'image' if size == 1 else 'images'} per forward"
    return f"{folded(head)}<br>{folded(cell.text().replace(' +- ', ' ± '))}"


def _size_labels(sizes: Sequence[int]) -> list[str]:
    """Return one label per size, empty where it would run into the one before."""
    span = math.log2(sizes[-1] / sizes[0])
    close = {after for before, after in pairwise(sizes) if math.log2(after / before) < span / 16}
    return ["" if size in close else f"{size:,}" for size in sizes]


def _loss_range(curves: Sequence[Curve], values: Sequence[float]) -> tuple[float, float]:
    # A run that diverges would press all others flat on the axis: it leaves the plot at the top instead.
    start = max(curve[0][1] for curve in curves if curve)
    high = min(max(values), 1.5 * start) if start > 0 else max(values)
    low = min(0.0, *values)
    return low, high + 0.05 * max(high - low, 1e-9)
