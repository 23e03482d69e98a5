"""The numbers of a report as texts, row by row: what the HTML page and the Markdown have in common."""

from batchless.report.contents import Contents
from batchless.report.conversions import Conversion
from batchless.report.difference import Difference
from batchless.report.main_figure import main_figure
from batchless.runs import Run, number

RUNS = ("folder", "normalizer", "images per forward", "seed", "result", "images seen", "seconds")
CURVES = ("normalizer", "images per forward", "seed", "values", "first", "best", "last")
LAYERS = ("layers", "first of them", "action", "was", "now", "detail")


def numbers_head(contents: Contents) -> tuple[str, ...]:
    """Return the titles of the columns of `number_rows`."""
    figures = (
        "sd",
        "n",
        "images/s",
        "waiting for data",
        "peak memory",
        "difference, points",
        "95 % interval",
        "interval by",
    )
    return ("normalizer", "images per forward", f"{contents.table.figure.word}, %", *figures)


def number_rows(contents: Contents) -> list[tuple[str, ...]]:
    """Return one row per cell, under `numbers_head`."""
    return [
        (
            cell.normalizer,
            f"{cell.images_per_forward:,}",
            "" if cell.mean is None else f"{100 * cell.mean:.1f}",
            "" if cell.sd is None else f"{100 * cell.sd:.1f}",
            str(cell.n),
            _speed(cell.speed),
            "" if cell.wait is None else f"{100 * cell.wait:.0f} %",
            _memory(cell.memory),
            *difference_texts(difference, control=cell is contents.control),
        )
        for cell, difference in zip(contents.table.cells, contents.differences, strict=True)
    ]


def run_rows(contents: Contents) -> list[tuple[str, ...]]:
    """Return one row of `RUNS` per run."""
    rows: list[tuple[str, ...]] = []
    for run in contents.runs:
        images, seconds = (number((run.summary or {}).get(key)) for key in ("images", "seconds"))
        rows.append(
            (
                str(run.path),
                str(run.config["normalizer"]),
                str(run.config["images_per_forward"]),
                str(run.config.get("seed", "")),
                result(run),
                "" if images is None else f"{images:,.0f}",
                "" if seconds is None else f"{seconds:,.1f}",
            )
        )
    return rows


def curve_rows(contents: Contents) -> list[tuple[str, ...]]:
    """Return one row of `CURVES` per run that logged a curve: what the charts show, as text."""
    learning = contents.learning
    if learning is None:
        return []
    best = max if learning.tested else min
    return [
        (
            str(run.config["normalizer"]),
            str(run.config["images_per_forward"]),
            str(run.config.get("seed", "")),
            str(len(curve)),
            *(
                f"{value:.4g}{learning.unit} after {images:,.0f}"
                for images, value in (curve[0], best(curve, key=lambda point: point[1]), curve[-1])
            ),
        )
        for run, curve in zip(contents.runs, learning.curves, strict=True)
        if curve
    ]


def layer_rows(conversion: Conversion) -> list[tuple[str, ...]]:
    """Return one row of `LAYERS` per group of layers that were treated the same way."""
    return [
        (str(layers.count), layers.first or "(model)", layers.action, layers.was, layers.now, layers.detail)
        for layers in conversion.layers
    ]


def result(run: Run) -> str:
    """Return what came out of a run."""
    if run.summary is None:
        return "not finished"
    if "failed" in run.summary:
        return f"failed: {run.summary['failed']}"
    figure = main_figure(run)
    accuracy = number(run.summary.get(f"test_{figure.name}"))
    return f"failed: no finite {figure.word}" if accuracy is None else f"{100 * accuracy:.2f} %"


def difference_texts(difference: Difference | None, *, control: bool) -> tuple[str, str, str]:
    """Return a difference in points, its interval, and how that was found; `control` says that this is the control."""
    if control:
        return "control", "", ""
    if difference is None:
        return "", "", ""
    value = f"{100 * difference.value:+.1f}"
    if difference.interval is None:
        return value, "", difference.how
    low, high = difference.interval
    return value, f"{100 * low:+.1f} to {100 * high:+.1f}", difference.how


def _speed(speed: float | None) -> str:
    if speed is None:
        return ""
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def _memory(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
