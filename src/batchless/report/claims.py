"""What the numbers of a comparison say about batch statistics at micro-batches, and what they do not say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from batchless.report.table import Cell, Comparison

MICRO = 2  # images per forward up to which one speaks of a micro-batch
FAILS = 5.0  # percentage points lost from which a normalizer is said to fail there
KEEPS = 2.0  # percentage points lost up to which a normalizer is said to keep its accuracy
SURE = 2.0  # standard errors of the loss, where there is more than one seed


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A normalizer at a micro-batch against the same normalizer at the largest batch; `lost` in percentage points."""

    small: Cell
    large: Cell
    lost: float | None
    error: float | None

    @property
    def name(self) -> str:
        return self.small.normalizer


def claims(comparison: Comparison) -> list[str]:
    """Return sentences computed from the numbers, each true of them and none going further.

    For every micro-batch size (at most 2 images per forward): how many percentage points each normalizer lost against
    the largest size, and whether "batch statistics fail at micro-batches while WS and BCN keep their accuracy" is
    shown. Shown means: every normalizer with batch statistics could not be trained or lost at least 5 points, by more
    than two standard errors; every normalizer without them that has WS or BCN lost at most 2, two standard errors
    above that still below 5, and is more accurate there. One seed is called no proof whatever the numbers are, and
    runs that are not like for like show nothing.
    """
    largest = comparison.sizes[-1]
    micro = [size for size in comparison.sizes if size <= MICRO < largest]
    if not micro:
        sizes = ", ".join(map(str, comparison.sizes))
        return [
            "Nothing can be said about micro-batches: that needs runs at 1 or 2 images per forward and at more; "
            f"here are runs at {sizes}."
        ]
    sentences = []
    for size in micro:
        changes = _changes(comparison, small=size, large=largest)
        sentences.append(_verdict(changes, size=size, largest=largest, alike=not comparison.warnings))
        sentences.append(_losses(changes, size=size, largest=largest))
    return sentences + _cautions(comparison)


def _changes(comparison: Comparison, *, small: int, large: int) -> list[_Change]:
    changes = []
    for name in comparison.normalizers:
        one, other = comparison.cell(name, small), comparison.cell(name, large)
        if one is None or other is None:
            continue
        lost = error = None
        if one.mean is not None and other.mean is not None:
            lost = 100 * (other.mean - one.mean)
        if one.sd is not None and other.sd is not None:
            error = 100 * math.sqrt(one.sd**2 / one.n + other.sd**2 / other.n)
        changes.append(_Change(small=one, large=other, lost=lost, error=error))
    return changes


def _losses(changes: Sequence[_Change], *, size: int, largest: int) -> str:
    head = f"At {_images(size)} per forward against {largest}, in percentage points"
    if not changes:
        return f"{head}: no normalizer was run at both."
    seeds = {cell.n for change in changes for cell in (change.small, change.large) if cell.n}
    same = f"; n = {seeds.pop()} each" if len(seeds) == 1 else ""
    return f"{head}: {'; '.join(_loss(change, with_n=not same) for change in changes)}{same}."


def _loss(change: _Change, *, with_n: bool) -> str:
    small, large = (_accuracy(cell, with_n=with_n) for cell in (change.small, change.large))
    return f"{change.name} {'has nothing to compare' if change.lost is None else _moved(change.lost)} ({small} against {large})"


def _verdict(changes: Sequence[_Change], *, size: int, largest: int, alike: bool) -> str:
    claim = f'"Batch statistics fail at {_images(size)} per forward while WS and BCN keep their accuracy"'
    batch = [change for change in changes if uses_batch_statistics(change.name)]
    others = [change for change in changes if _is_remedy(change.name)]
    if not batch or not others:
        missing = "with batch statistics" if not batch else "with WS or BCN and without batch statistics"
        return f"{claim} cannot be judged: no normalizer {missing} was run at both {size} and {largest}."
    unknown = [change.name for change in (*batch, *others) if _unknown(change)]
    if unknown:
        return f"{claim} cannot be judged: there is no accuracy to compare with for {', '.join(unknown)}."
    against = [*map(_not_failing, batch), *map(_not_keeping, others), *_not_better(batch, others)]
    if any(against):
        return f"{claim} is NOT shown by these numbers: {'; '.join(filter(None, against))}."
    seeds = min(cell.n + len(cell.failures) for change in (*batch, *others) for cell in (change.small, change.large))
    if seeds == 1:
        verdict = "agrees with these numbers, but one seed is no proof"
    elif not alike:
        verdict = "agrees with these numbers, but the runs are not like for like"
    else:
        verdict = f"is shown by these numbers, {seeds} seeds or more each"
    return f"{claim} {verdict}. {_level(batch, others)}"


def _unknown(change: _Change) -> bool:
    """Without an accuracy at the large batch there is nothing to lose; an unfinished run is no failure."""
    return change.large.mean is None or (change.small.mean is None and not change.small.failures)


def _not_failing(change: _Change) -> str:
    if change.lost is None:
        return ""  # it could not be trained: that is failing
    if change.lost < FAILS:
        return f"{change.name} {_moved(change.lost)} points (failing is {FAILS:.0f} or more lost)"
    if change.error is not None and change.lost <= SURE * change.error:
        return f"{change.name} lost {change.lost:.1f} points, which its spread over seeds may explain"
    return ""


def _not_keeping(change: _Change) -> str:
    if change.lost is None:
        return f"{change.name} could not be trained"
    if change.small.failures:
        return f"{change.name}: {change.small.trouble()}"
    if change.lost > KEEPS:
        return f"{change.name} {_moved(change.lost)} points (keeping is {KEEPS:.0f} or less lost)"
    if change.error is not None and change.lost + SURE * change.error >= FAILS:
        return f"{change.name} {_moved(change.lost)} points, but its spread over seeds allows a loss of {FAILS:.0f}"
    return ""


def _not_better(batch: Sequence[_Change], others: Sequence[_Change]) -> list[str]:
    best = max(batch, key=lambda change: _percent(change.small)).small
    if best.mean is None:
        return []
    return [
        f"{change.name} has {_percent(change.small):.1f} % there, {best.normalizer} {_percent(best):.1f} %"
        for change in others
        if change.small.mean is not None and change.small.mean <= best.mean
    ]


def _level(batch: Sequence[_Change], others: Sequence[_Change]) -> str:
    """Keeping a poor accuracy is no merit: say how the best remedy compares with batch statistics at their best."""
    reference, best = max(batch, key=lambda c: _percent(c.large)), max(others, key=lambda c: _percent(c.small))
    gap = _percent(best.small) - _percent(reference.large)
    return (
        f"The best of them there, {best.name} with {_percent(best.small):.1f} %, is {abs(gap):.1f} points "
        f"{'above' if gap >= 0 else 'below'} {reference.name} at {reference.large.images_per_forward}."
    )


def _cautions(comparison: Comparison) -> list[str]:
    seeds = [cell.n for cell in comparison.cells if cell.n]
    sentences = []
    if 1 in seeds:
        which = "Every accuracy here is" if set(seeds) == {1} else "Some accuracies here are"
        sentences.append(f"{which} from one seed, and one seed is no proof: repeat with other seeds to rely on it.")
    if any(cell.n and cell.failures for cell in comparison.cells):
        sentences.append("Where only some seeds failed, the mean is over the others, and so is too good.")
    if comparison.warnings:
        sentences.append(
            "The runs are not like for like in everything: read the differences listed with the table first."
        )
    return sentences


def uses_batch_statistics(normalizer: str) -> bool:
    """Whether the normalizer of this name normalizes with statistics of the micro-batch, by its activation part."""
    return _activation(normalizer) in ("bn", "sync-bn", "bcn")


def _is_remedy(normalizer: str) -> bool:
    weight = normalizer.partition("+")[2].partition("(")[0]
    standardized = weight in ("ws", "sws") or _activation(normalizer) == "bcn-micro"
    return standardized and not uses_batch_statistics(normalizer)


def _activation(normalizer: str) -> str:
    return normalizer.partition("+")[0].partition("(")[0]


def _percent(cell: Cell) -> float:
    return -math.inf if cell.mean is None else 100 * cell.mean


def _moved(lost: float) -> str:
    return f"lost {lost:.1f}" if lost >= 0 else f"gained {-lost:.1f}"


def _accuracy(cell: Cell, *, with_n: bool) -> str:
    if cell.mean is None:
        return f"no accuracy [{cell.trouble()}]"
    spread = "" if cell.sd is None else f" +- {100 * cell.sd:.1f}"
    n = f", n = {cell.n}" if with_n else ""
    trouble = f" [{cell.trouble()}]" if cell.trouble() else ""
    return f"{100 * cell.mean:.1f}{spread} %{n}{trouble}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
