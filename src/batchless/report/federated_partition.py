"""Who held which images: the partitions of federated runs, for a picture and a table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from batchless.report.likeness import say
from batchless.report.optional import read_optional
from batchless.runs import Run

FILE = "partition.json"
MOST = 4  # partitions shown


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A client: its domain (several with + between), training images of each class, and how many images validate."""

    id: int
    domain: str
    counts: tuple[int, ...]
    validation: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which client holds how many images of which class.

    Attributes:
        rule: the partitioner and its settings.
        seeds: the seeds it was made with; shown is the first.
        classes: their names.
        holders: the clients by id, those of one domain together.
        tests: test images of every domain.
        unseen: domains without a client.
    """

    rule: str
    seeds: tuple[str, ...]
    classes: tuple[str, ...]
    holders: tuple[Holder, ...]
    tests: tuple[tuple[str, int], ...]
    unseen: tuple[str, ...]

    @property
    def title(self) -> str:
        """The rule and the seed that is shown."""
        others = len(self.seeds) - 1
        more = f" ({others} other seed{'s' if others > 1 else ''}, each with a partition of its own)" if others else ""
        return f"{self.rule}, seed {self.seeds[0]}{more}"

    @property
    def domains(self) -> tuple[str, ...]:
        """Those with clients, in the order of these."""
        return tuple(dict.fromkeys(holder.domain for holder in self.holders))


def read_partitions(runs: Sequence[Run]) -> tuple[list[Partition], list[str]]:
    """Return the different partitions among `runs`, one for all seeds of a rule, and one line for each thing left out."""
    found: dict[str, list[Partition]] = {}
    missing, notes = 0, []
    for run in runs:
        try:
            value = read_optional(run.path / FILE)
        except ValueError as error:
            notes.append(f"{error}: its partition is left out")
            continue
        if value is None:
            missing += 1
            continue
        try:
            partition = _partition(value)
        except (KeyError, TypeError, AttributeError, ValueError):
            notes.append(f"{run.path / FILE} is not as batchless writes it: its partition is left out")
        else:
            found.setdefault(_but_for_the_seed(partition, run), []).append(partition)
    if missing:
        notes.append(f"{missing} of {len(runs)} federated run folders have no {FILE} (failed early, or older)")
    if len(found) > MOST:
        notes.append(f"partitions are shown for {MOST} of {len(found)} rules; the others are left out")
    shown = [_with_seeds(group) for group in list(found.values())[:MOST]]
    return shown, notes


def _but_for_the_seed(partition: Partition, run: Run) -> str:
    """What two partitions have in common that differ by their seed alone; the images of a client may then be others."""
    data = run.config.get("data")
    settings = {key: value for key, value in data.items() if key != "seed"} if isinstance(data, dict) else {}
    domains = [holder.domain for holder in partition.holders]
    return json.dumps([partition.rule, partition.classes, domains, partition.tests, settings], default=str)


def _with_seeds(group: Sequence[Partition]) -> Partition:
    return replace(group[0], seeds=tuple(dict.fromkeys(seed for partition in group for seed in partition.seeds)))


def _partition(value: Any) -> Partition:
    rule = dict(value["partitioner"])
    name = str(rule.pop("name"))
    settings = ", ".join(f"{key}={say(setting)}" for key, setting in rule.items() if setting is not None)
    classes = tuple(map(str, value["classes"]))
    holders = tuple(
        Holder(
            id=int(client["id"]),
            domain=str(client["domain"]),
            counts=_counts(client["counts"], classes),
            validation=_length(client.get("validation") or ()),
        )
        for client in value["clients"]
    )
    if not holders or not classes:
        raise ValueError("without clients or classes there is nothing to draw")
    return Partition(
        rule=f"{name}({settings})" if settings else name,
        seeds=(say(value.get("seed")),),
        classes=classes,
        holders=holders,
        tests=tuple((str(domain), int(test["images"])) for domain, test in value["tests"].items()),
        unseen=tuple(map(str, value.get("unseen", ()))),
    )


def _length(indices: Any) -> int:
    """How many; of a client with several domains there is a list for each."""
    return sum(map(len, indices.values())) if isinstance(indices, dict) else len(indices)


def _counts(counts: Any, classes: Sequence[str]) -> tuple[int, ...]:
    found = tuple(int(count) for count in counts)
    if len(found) != len(classes):
        raise ValueError(f"a client with counts of {len(found)} classes, there are {len(classes)}")
    return found
