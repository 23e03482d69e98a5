"""Fair timings of several contestants in one process, and the ratios between them."""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Contestant = Callable[[], object]
Clock = Callable[[], float]
"""Seconds since some moment."""
Times = Mapping[str, tuple[float, ...]]
"""Seconds by contestant; the i-th of each comes from the same round."""

MIN_ROUNDS = 6
"""Below it even the smallest and the largest time do not enclose the median with 95 % confidence (1 - 2 / 2^6 = 97 %)."""

Verdict = Literal["met", "missed", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """`of` is to take at most `at_most` times as long, or as many bytes, as `base`."""

    of: str
    base: str
    at_most: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured, and what is to be read from it.

    Attributes:
        title: one line.
        base: the contestant that the table's ratios refer to.
        times: of all contestants.
        targets: to be judged.
        byte_targets: the same of `saved_bytes`.
        bytes_moved: by contestant, what an implementation must read and write at least, where that bounds the time.
        saved_bytes: by contestant, what its forward keeps for the backward pass, where that is the question.
        items: images or clips that each contestant goes through in a round, where images per second are the question.
        notes: what else was found, a line each.
    """

    title: str
    base: str
    times: Times
    targets: tuple[Target, ...] = ()
    byte_targets: tuple[Target, ...] = ()
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    saved_bytes: Mapping[str, int] = field(default_factory=dict)
    items: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One contestant's time over another's: of the minima, and paired (see `ratio`)."""

    rounds: int
    minima: float
    paired: float
    low: float
    high: float


def interleave(
    contestants: Mapping[str, Contestant],
    *,
    repeats: int,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Seconds of every contestant in `repeats` rounds, after one round of warm-up that does not count.

    Every round runs each contestant once, in a newly shuffled order: what disturbs the machine for a while disturbs
    all alike, and nobody always runs on the caches or the heap that the same other one has left. Garbage is collected
    before a round and not during it.

    Args:
        contestants: functions by name; what one returns is freed within its time.
        repeats: rounds that count, 1 or more.
        seed: of the orders.
        clock: seconds.
        on_round: called with (rounds done, rounds in all), warm-up included.

    Raises:
        ValueError: fewer than 1 repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(repeats + 1):
            shuffle(order)
            gc.collect()
            for name in order:
                begin = clock()
                contestants[name]()
                seconds[name].append(clock() - begin)
            if on_round is not None:
                on_round(done + 1, repeats + 1)
    finally:
        if collecting:
            gc.enable()
    return {name: tuple(measured[1:]) for name, measured in seconds.items()}


def ratio(times: Times, of: str, base: str, *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """How long `of` takes relative to `base`: the median of the rounds' ratios, with its bootstrap interval.

    Paired, since the two of one round ran shortly after each other: what slows the machine for longer than a round slows
    both, and cancels in their ratio. In the ratio of their medians it does not: each may come from another hour.
    """
    return combined(times, (of, base), lambda above, below: above / below, resamples=resamples, seed=seed)


def combined(
    times: Times, names: Sequence[str], combine: Callable[..., Any], *, resamples: int = 2000, seed: int = 0
) -> Ratio:
    """As `ratio`, of what `combine` makes of the times of the contestants `names`, in this order, numbers or arrays."""
    found = np.array([times[name] for name in names])
    by_round = combine(*found)
    count = len(by_round)
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.percentile(np.median(by_round[drawn], axis=1), [2.5, 97.5])
    return Ratio(
        rounds=count,
        minima=float(combine(*found.min(axis=1))),
        paired=float(np.median(by_round)),
        low=float(low),
        high=float(high),
    )


def judge(target: Target, measured: Ratio) -> Verdict:
    """`met` or `missed` only where minima and the whole interval agree on it, after rounds enough."""
    if measured.rounds < MIN_ROUNDS:
        return "undecided"
    if max(measured.minima, measured.high) <= target.at_most:
        return "met"
    if min(measured.minima, measured.low) > target.at_most:
        return "missed"
    return "undecided"


def spread(seconds: tuple[float, ...]) -> float:
    """The interquartile range as a fraction of the median."""
    lower, middle, upper = np.percentile(seconds, [25, 50, 75])
    return float((upper - lower) / middle)
