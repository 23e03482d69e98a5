"""Learning curves, as numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from batchless.report.main_figure import main_figure
from batchless.runs import Run, number

POINTS = 120  # of one curve; more cannot be seen
Curve = tuple[tuple[float, float], ...]
"""Images seen and the value there, in order."""


@dataclass(frozen=True, kw_only=True)
class LearningCurves:
    """What every run logged while it trained.

    Attributes:
        what: the value.
        unit: of the value, with the space before it.
        tested: whether the value is the test accuracy, in percent; otherwise it is the training loss.
        curves: one for each run, in their order; empty where a run logged nothing.
    """

    what: str
    unit: str
    tested: bool
    curves: tuple[Curve, ...]


def learning_curves(runs: Sequence[Run]) -> LearningCurves | None:
    """Return the test accuracy where a run was tested twice or more, otherwise the training loss; None without either."""
    tested = [_curve(run, kind="test", value=main_figure(run).name, factor=100.0) for run in runs]
    if any(len(curve) > 1 for curve in tested):
        return LearningCurves(what=main_figure(runs[0]).title, unit=" %", tested=True, curves=tuple(tested))
    trained = [_curve(run, kind="train", value="loss") for run in runs]
    if any(len(curve) > 1 for curve in trained):
        return LearningCurves(what="training loss", unit="", tested=False, curves=tuple(trained))
    return None


def _curve(run: Run, *, kind: str, value: str, factor: float = 1.0) -> Curve:
    points = [
        (images, factor * found)
        for record in run.metrics
        if record.get("kind") == kind
        and (images := number(record.get("images"))) is not None
        and (found := number(record.get(value))) is not None
    ]
    return tuple((group[-1][0], fmean(y for _, y in group)) for group in grouped(points))


def grouped(points: Sequence[tuple[float, float]]) -> Iterator[Sequence[tuple[float, float]]]:
    """Yield consecutive points in at most `POINTS` groups."""
    share = max(math.ceil(len(points) / POINTS), 1)
    for start in range(0, len(points), share):
        yield points[start : start + share]
