"""How federated runs learn: curves by domain, and how long each method takes to a level of accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from batchless.report.curves import grouped
from batchless.report.federated_table import MEAN, Method
from batchless.runs import Run, number

SHARE = 0.9  # of the control's accuracy at the end: the level that methods are timed by


@dataclass(frozen=True, kw_only=True)
class Point:
    """A test: `percent` after so many rounds, images, and communicated bytes (None where nothing says)."""

    rounds: float
    images: float | None
    bytes: float | None
    percent: float


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """When a method's mean test accuracy first reached a level.

    Attributes:
        method: its name.
        runs: how many of its runs were tested.
        reached: the first test at the level or above, of each run that got there.
    """

    method: str
    runs: int
    reached: tuple[Point, ...]

    def average(self, figure: str) -> float | None:
        """Return the mean of `rounds`, `images` or `bytes` over the runs that got there; None without one."""
        values = [value for point in self.reached if (value := getattr(point, figure)) is not None]
        return fmean(values) if values else None


def curve(run: Run, domain: str = MEAN) -> tuple[Point, ...]:
    """Return the tests of a run on one domain, by round; of a round tested twice, after a resume, the last counts."""
    sent = {record.get("round"): number(record.get("bytes")) for record in run.metrics if record.get("kind") == "round"}
    points: dict[float, Point] = {}
    for record in run.metrics:
        if record.get("kind") != "test" or record.get("domain") != domain:
            continue
        rounds, accuracy = number(record.get("round")), number(record.get("accuracy"))
        if rounds is not None and accuracy is not None:
            points[rounds] = Point(
                rounds=rounds,
                images=number(record.get("images")),
                bytes=sent.get(record.get("round")),
                percent=100 * accuracy,
            )
    return tuple(points[rounds] for rounds in sorted(points))


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return few enough points to draw: means of the accuracy over consecutive tests, placed at the last of them."""
    groups = grouped([(index, point.percent) for index, point in enumerate(points)])
    return [
        Point(rounds=end.rounds, images=end.images, bytes=end.bytes, percent=fmean(y for _, y in group))
        for group in groups
        if (end := points[int(group[-1][0])])
    ]


def convergence(methods: Sequence[Method], *, percent: float) -> list[Convergence]:
    """Return when each method that was tested first reached `percent` in the mean over the domains."""
    found = []
    for method in methods:
        curves = [points for run in method.runs if (points := curve(run))]
        firsts = [next((point for point in points if point.percent >= percent), None) for points in curves]
        if curves:
            reached = tuple(point for point in firsts if point is not None)
            found.append(Convergence(method=method.name, runs=len(curves), reached=reached))
    return found
