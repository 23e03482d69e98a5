"""One accuracy per seed: its mean, its spread, and why some are missing."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Test accuracies that differ by nothing but the seed.

    Attributes:
        accuracies: of each run that has one, 0 to 1.
        seeds: of each of those runs; None if it is no whole number.
    """

    accuracies: tuple[float, ...]
    seeds: tuple[int | None, ...]

    @property
    def n(self) -> int:
        """How many runs the mean is over."""
        return len(self.accuracies)

    @property
    def mean(self) -> float | None:
        """Mean test accuracy, 0 to 1; None without one."""
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of the test accuracy; None below two runs."""
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    def percent(self) -> str:
        """Return mean and standard deviation in percent, `71.2 +- 0.8`; empty without an accuracy."""
        if self.mean is None:
            return ""
        return f"{100 * self.mean:.1f}" + ("" if self.sd is None else f" +- {100 * self.sd:.1f}")


def trouble(done: int, failures: Sequence[str], unfinished: int) -> str:
    """Say what did not come to an accuracy: the reasons, and how many runs of how many; empty if all did."""
    runs = done + len(failures) + unfinished
    parts = [
        f"failed: {reason}" if runs == 1 else f"{count} of {runs} failed: {reason}"
        for reason, count in Counter(failures).items()
    ]
    if unfinished:
        parts.append("not finished" if runs == 1 else f"{unfinished} of {runs} not finished")
    return "; ".join(parts)
