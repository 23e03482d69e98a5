"""What converting the network derived from a normalizer's name: group counts, gains, what was kept and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchless.report.optional import read_optional
from batchless.runs import Run

FILE = "conversion.json"


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Layers that were treated the same way: how many, which was the first, and what `ConversionReport` says of them."""

    count: int
    first: str
    action: str
    was: str
    now: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What one normalizer did to one network.

    Attributes:
        normalizer: its canonical name.
        found_by: how it was found which layer feeds which.
        runs: how many of the compared runs say exactly this.
        layers: in the network's order, equal ones together.
        notes: what of the network's function changed.
    """

    normalizer: str
    found_by: str
    runs: int
    layers: tuple[Layers, ...]
    notes: tuple[str, ...]


def read_conversions(runs: Sequence[Run]) -> tuple[list[Conversion], list[str]]:
    """Return the different conversions among `runs`, and one line for each that is missing or damaged."""
    found: Counter[Conversion] = Counter()
    missing, damaged = [], []
    for run in runs:
        try:
            value = read_optional(run.path / FILE)
            if value is None:
                missing.append(run)
            else:
                found[_conversion(value)] += 1
        except ValueError as error:
            damaged.append(f"{error}: its derived settings are left out")
        except (KeyError, TypeError, AttributeError):
            damaged.append(f"{run.path / FILE} is not as batchless writes it: its derived settings are left out")
    notes = [f"{len(missing)} of {len(runs)} run folders have no {FILE} (failed early, or older)"] if missing else []
    conversions = [
        Conversion(normalizer=one.normalizer, found_by=one.found_by, runs=count, layers=one.layers, notes=one.notes)
        for one, count in found.items()
    ]
    return conversions, notes + damaged


def _conversion(value: Any) -> Conversion:
    alike: dict[tuple[str, ...], list[str]] = {}
    for entry in value["entries"]:
        what = tuple(str(entry[key]) for key in ("action", "was", "now", "detail"))
        alike.setdefault(what, []).append(str(entry["name"]))
    return Conversion(
        normalizer=str(value["normalizer"]),
        found_by=str(value["found_by"]),
        runs=1,
        layers=tuple(
            Layers(count=len(names), first=names[0], action=action, was=was, now=now, detail=detail)
            for (action, was, now, detail), names in alike.items()
        ),
        notes=tuple(str(note) for note in value["notes"]),
    )
