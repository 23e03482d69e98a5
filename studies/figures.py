"""Figures of several seeds, and their differences, as the cells of a Markdown table."""

from statistics import fmean, stdev

from batchless.report.difference import difference
from batchless.report.sample import Sample


def percent(shares: list[float]) -> str:
    """Mean, and sample standard deviation where there are several; empty without any."""
    values = [100 * share for share in shares]
    if not values:
        return ""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def points(sample: Sample, control: Sample) -> str:
    """How many points more than the control, with the 95 % interval where the seeds allow one."""
    found = difference(sample, control)
    if found is None:
        return ""
    text = f"{100 * found.value:+.1f}"
    if found.interval is None:
        return text
    return f"{text} ({100 * found.interval[0]:+.1f}..{100 * found.interval[1]:+.1f})"
