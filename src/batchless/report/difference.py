"""Differences from the control, each with the interval that its seeds allow."""

import math
import statistics
from dataclasses import dataclass

from batchless.report.sample import Sample
from batchless.report.table import Cell, Comparison

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean test accuracy of some runs minus that of the control, as a share: 0.01 is one percentage point.

    Attributes:
        value: the difference of the means.
        interval: its 95 % confidence interval; None where the seeds allow none.
        how: how the interval was found, or why there is none.
    """

    value: float
    interval: tuple[float, float] | None
    how: str


def choose_control(comparison: Comparison, wanted: str | None = None) -> Cell:
    """Return the cell that all others are compared with.

    Args:
        comparison: the cells to choose from.
        wanted: a normalizer (at the largest number of images per forward it was run at), or `bn@64` for another
            number; None: `bn` if it was run, else the first normalizer.

    Raises:
        ValueError: nothing of that name was run.
    """
    names = comparison.normalizers
    if wanted is None:
        wanted = "bn" if "bn" in names else names[0]
    name, at, size = (wanted, "", "") if wanted in names else wanted.rpartition("@")
    cells = [cell for cell in comparison.cells if cell.normalizer == name]
    for cell in sorted(cells, key=lambda cell: -cell.images_per_forward):
        if not at or size == str(cell.images_per_forward):
            return cell
    possible = ", ".join(f"{cell.normalizer}@{cell.images_per_forward}" for cell in cells or comparison.cells)
    raise ValueError(f"control is {wanted!r}, which was not run; give a normalizer, or one of {possible}")


def difference(cell: Sample, control: Sample) -> Difference | None:
    """Return how much more accurate `cell` is than `control`; None if either has no accuracy.

    With the same seeds in both, the differences seed by seed are taken (Student's t); otherwise the two means are
    independent with variances of their own (Welch's t). One seed says nothing about the spread, nor do several whose
    accuracies are all the same: then there is no interval.
    """
    if cell.mean is None or control.mean is None:
        return None
    value = cell.mean - control.mean
    if min(cell.n, control.n) < 2:
        return Difference(value=value, interval=None, how="none: one seed")
    pairs = _by_seed(cell, control)
    error, freedom = _welch(cell.accuracies, control.accuracies) if pairs is None else _paired(pairs)
    if error < 1e-12:
        return Difference(value=value, interval=None, how="none: no spread")
    half = _quantile(freedom) * error
    how = "Welch" if pairs is None else "paired by seed"
    return Difference(value=value, interval=(value - half, value + half), how=how)


def points_text(found: Difference) -> str:
    """Return a difference for a sentence.

    >>> points_text(Difference(value=-0.021, interval=None, how=""))
    '2.1 points below'
    """
    return f"{100 * abs(found.value):.1f} points {'above' if found.value >= 0 else 'below'}"


def interval_text(found: Difference) -> str:
    """Return the interval of a difference as the end of a sentence, and whether it allows one; empty without one."""
    if found.interval is None:
        return ""
    low, high = (100 * end for end in found.interval)
    verdict = "" if low > 0 or high < 0 else ", which its spread over seeds may explain"
    return f", 95 % interval {low:+.1f} to {high:+.1f}{verdict}"


def _by_seed(cell: Sample, control: Sample) -> list[float] | None:
    """Return the differences of the runs with the same seed; None unless each seed is in both, once."""
    one, other = (dict(zip(each.seeds, each.accuracies, strict=True)) for each in (cell, control))
    if None in one or one.keys() != other.keys() or len(one) != cell.n or len(other) != control.n:
        return None
    return [accuracy - other[seed] for seed, accuracy in one.items()]


def _paired(differences: list[float]) -> tuple[float, float]:
    """Standard error of the mean, and degrees of freedom."""
    n = len(differences)
    return statistics.stdev(differences) / math.sqrt(n), n - 1


def _welch(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, float]:
    """Standard error of the difference of two means, and Welch and Satterthwaite's degrees of freedom."""
    a, b = (statistics.variance(values) / len(values) for values in (one, other))
    spread = a**2 / (len(one) - 1) + b**2 / (len(other) - 1)
    return math.sqrt(a + b), ((a + b) ** 2 / spread if spread else math.inf)


def _quantile(freedom: float) -> float:
    from scipy.special import stdtrit  # scipy.stats has the same and takes a second to import

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
