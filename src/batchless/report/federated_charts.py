"""The charts of federated runs: accuracy by domain, learning curves, and the partition as a heat map."""

from collections.abc import Mapping, Sequence
from typing import Any

from batchless.report.escape import chart_text
from batchless.report.federated_curves import Point, curve, thinned
from batchless.report.federated_partition import Partition
from batchless.report.federated_table import FederatedComparison, Method
from batchless.report.figure import Figure, base_layout, folded, line_trace, percent_range
from batchless.report.style import Style
from batchless.runs import Run

ACROSS = {"rounds": "rounds", "images": "images seen by all clients", "bytes": "bytes communicated"}
"""What the horizontal axis of a learning curve may count, and its title."""
PER = {"rounds": "round", "images": "image", "bytes": "byte communicated"}


def domains_chart(table: FederatedComparison, looks: Mapping[str, Style]) -> Figure | None:
    """Return test accuracy at the last round by domain, with sd bars where n > 1; None if no run has an accuracy."""
    methods = [method for method in table.methods if method.score().n]
    if not methods:
        return None
    traces, ends = [], []
    apart = 0.7 / len(methods)
    for position, method in enumerate(methods):
        look, colour = looks[method.name], f"--c{looks[method.name].colour}"
        scores = [(x, column, score) for x, column in enumerate(table.columns) if (score := method.score(column)).n]
        means = [100 * (score.mean or 0.0) for _, _, score in scores]
        spread = [100 * (score.sd or 0.0) for _, _, score in scores]
        ends += [value for mean, sd in zip(means, spread, strict=True) for value in (mean - sd, mean + sd)]
        trace = line_trace(look, method.name) | {
            "mode": "markers",
            "x": [x + apart * (position - (len(methods) - 1) / 2) for x, _, _ in scores],
            "y": means,
            "text": [_score_label(method, column, score.percent(), score.n) for _, column, score in scores],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"symbol": look.symbol, "size": 9, "color": colour, "line": {"width": 1, "color": "--page"}},
        }
        if any(spread):
            trace["error_y"] = {"type": "data", "array": spread, "color": colour, "thickness": 1.25, "width": 3}
        traces.append(trace)
    low, high = percent_range(min(ends), max(ends))
    last = len(table.columns) - 1
    layout = base_layout("test accuracy at the last round, %", height=380)
    layout["xaxis"] |= {
        "range": [-0.5, last + 0.5],
        "tickvals": list(range(last + 1)),
        "ticktext": [folded(column, width=12, lines=2) for column in table.columns],
    }
    layout["yaxis"] |= {"range": [low, high]}
    layout["shapes"] = [
        {
            "type": "line",
            "x0": x + 0.5,
            "x1": x + 0.5,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": colour, "width": 1},
        }
        for x in range(last)
        for colour in ["--soft" if x == last - 1 else "--grid"]  # the mean stands apart
    ]
    return {"data": traces, "layout": layout}


def curve_charts(table: FederatedComparison, looks: Mapping[str, Style]) -> dict[str, Figure]:
    """Return one chart for the mean and one per domain that was tested twice or more, one line per run; same axes in all."""
    curves = {
        column: [
            (method.name, run, thinned(points))
            for method in table.methods
            for run in method.runs
            if (points := curve(run, column))
        ]
        for column in reversed(table.columns)  # the mean first
    }
    seen = [point for column in curves.values() for _, _, points in column for point in points]
    if not any(len(points) > 1 for column in curves.values() for _, _, points in column):
        return {}
    low, high = percent_range(min(point.percent for point in seen), max(point.percent for point in seen))
    counted = [figure for figure in ACROSS if all(getattr(point, figure) is not None for point in seen)]
    counted = [figure for figure in counted if any(getattr(point, figure) for point in seen)]  # nothing sent: no axis
    charts = {}
    for column in [table.columns[-1], *table.domains]:
        if not curves[column]:
            continue
        layout = base_layout("test accuracy, %", height=240)
        layout["yaxis"] |= {"range": [low, high], "nticks": 6}
        across = {figure: _across(figure, [points for _, _, points in curves[column]], seen) for figure in counted}
        layout["xaxis"] |= across["rounds"]["xaxis"]
        traces = [
            _learning(name, run, points, looks[name]) | {"x": xs}
            for (name, run, points), xs in zip(curves[column], across["rounds"]["x"], strict=True)
        ]
        charts[column] = {"data": traces, "layout": layout, "across": across}
    return charts


def partition_chart(partition: Partition) -> Figure:
    """Return the number of training images by client (down) and class (across): the darker, the more."""
    holders, classes = partition.holders, [chart_text(name) for name in partition.classes]
    firsts = [next(y for y, one in enumerate(holders) if one.domain == domain) for domain in partition.domains]
    ends = [*firsts[1:], len(holders)]
    trace = {
        "type": "heatmap",
        "z": [list(holder.counts) for holder in holders],
        "x": list(range(len(classes))),
        "y": list(range(len(holders))),
        "text": [
            [_holder_label(holder.id, holder.domain, n, name) for n, name in zip(holder.counts, classes, strict=True)]
            for holder in holders
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "colorscale": [[0, "--panel"], [1, "--c0"]],
        "zmin": 0,
        "zmax": max(1, *(count for holder in holders for count in holder.counts)),
        "xgap": 1,
        "ygap": 1 if len(holders) <= 60 else 0,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"color": "--soft", "size": 12}, "nticks": 5},
    }
    layout = base_layout("training images by client and class", height=max(200, min(96 + 20 * len(holders), 640)))
    layout["xaxis"] |= {"tickvals": trace["x"], "ticktext": classes, "showline": False, "ticks": ""}
    layout["yaxis"] |= {
        "autorange": "reversed",
        "showgrid": False,
        "tickvals": [(first + end - 1) / 2 for first, end in zip(firsts, ends, strict=True)],
        "ticktext": [
            _domain_label(name, end - first) for name, first, end in zip(partition.domains, firsts, ends, strict=True)
        ],
    }
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": first - 0.5,
            "y1": first - 0.5,
            "line": {"color": "--soft", "width": 1},
        }
        for first in firsts[1:]
    ]
    return {"data": [trace], "layout": layout}


def _across(figure: str, curves: Sequence[Sequence[Point]], seen: Sequence[Point]) -> dict[str, Any]:
    most = max(getattr(point, figure) for point in seen)
    title = {"text": ACROSS[figure], "font": {"color": "--soft", "size": 12}}
    return {
        "x": [[getattr(point, figure) for point in points] for points in curves],
        "xaxis": {"range": [-0.03 * most, 1.05 * most], "tickformat": "~s", "nticks": 5, "title": title},
    }


def _learning(name: str, run: Run, points: Sequence[Point], look: Style) -> dict[str, Any]:
    head = folded(f"{name}, seed {run.config.get('seed', '?')}")
    return line_trace(look, name) | {
        "mode": "lines+markers",
        "y": [point.percent for point in points],
        "text": [f"{head}<br>{point.percent:.4g} % after round {point.rounds:,.0f}" for point in points],
        "hovertemplate": "%{text}<extra></extra>",
        # The end alone is marked: it tells lines apart that share a colour.
        "marker": {
            "symbol": look.symbol,
            "size": [0] * (len(points) - 1) + [8],
            "opacity": 1,
            "color": f"--c{look.colour}",
            "line": {"width": 0},
        },
    }


def _score_label(method: Method, column: str, percent: str, n: int) -> str:
    return f"{folded(f'{method.name}: {column}')}<br>{percent.replace(' +- ', ' ± ')} % (n={n})"


def _holder_label(client: int, domain: str, images: int, name: str) -> str:
    return f"{folded(f'client {client}, {domain}')}<br>{images:,} of class {name}"


def _domain_label(domain: str, clients: int) -> str:
    name = folded(domain, width=16, lines=2)
    return name if clients == 1 else f"{name}<br>{clients} clients"
