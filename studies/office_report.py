"""The tables of the study of FedWon's tables: ours beside the published numbers."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from studies.figures import percent
from studies.office_cells import FULL, PUBLISHED, PUBLISHED_CIFAR, SMALL

_HEAD = (
    "| method | rounds | AGC | learning rate | gamma | n | last round | chosen round | by domain (last) | published |"
)
_RULE = "|---|---:|---|---:|---|---:|---:|---:|---|---:|"
_CIFAR_HEAD = "| method | label skew | n | last round | chosen round | published (MobileNetV2, 300 rounds) |"
_CIFAR_RULE = "|---|---|---:|---:|---:|---:|"


def federated_tables(records: Mapping[str, Any]) -> Iterator[list[str]]:
    """One Markdown table for each resolution and step, and one for CIFAR-10; none where nothing is kept.

    Rows are settings with their seeds, best validation accuracy first: the rate of a method is its first row. A run that
    diverged is said to have, and is in no mean. Published numbers are at full resolution and stand beside the reduced rows to
    be compared in their order only.
    """
    office = [record for record in records.values() if record["data"] == "office"]
    for size in (FULL, SMALL):
        for step in (32, 2):
            chosen = [each for each in office if (each["image_size"], each["images_per_step"]) == (size, step)]
            if chosen:
                reduced = "" if size == FULL else ", reduced: the published numbers are at 256 pixels"
                yield [
                    f"Office-Caltech-10, {size} pixels, {step} images per step{reduced}:",
                    "",
                    _HEAD,
                    _RULE,
                    *_rows(chosen),
                    "",
                ]
    cifar = [record for record in records.values() if record["data"] == "cifar10"]
    if cifar:
        yield [
            "CIFAR-10 over 100 clients, ten in a round, ResNet-8:",
            "",
            _CIFAR_HEAD,
            _CIFAR_RULE,
            *_cifar_rows(cifar),
            "",
        ]


def _rows(records: list[dict[str, Any]]) -> list[str]:
    keys = ("method", "rounds", "clipping", "learning_rate", "gamma")
    groups = _grouped(records, keys)
    groups.sort(key=lambda group: (group[0]["method"], -_mean(group, "chosen_validation_accuracy")))
    lines = []
    for group in groups:
        one, done = group[0], _ended(group)
        published = PUBLISHED.get((one["method"], one["images_per_step"]))
        by_domain = ", ".join(
            f"{name} {100 * fmean(each['summary']['domains'][name]['accuracy'] for each in done):.1f}"
            for name in (done[0]["summary"]["domains"] if done else ())
        )
        gamma = one["gamma"] or ("constant" if one["method"] == "fedwon" else "")
        cells = [
            one["method"],
            str(one["rounds"]),
            f"{one['clipping']:g}" if one["clipping"] else "off",
            f"{one['learning_rate']:g}",
            gamma,
        ]
        cells += [_number(group), _percent(group, "test_accuracy"), _percent(group, "chosen_test_accuracy"), by_domain]
        lines.append("| " + " | ".join([*cells, "" if published is None else f"{published:.1f}"]) + " |")
    return lines


def _cifar_rows(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for group in _grouped(records, ("method", "alpha")):
        alpha = group[0]["alpha"] or "iid"
        published = PUBLISHED_CIFAR.get((group[0]["method"], alpha))
        cells = [group[0]["method"], alpha, _number(group), _percent(group, "test_accuracy")]
        cells += [_percent(group, "chosen_test_accuracy"), "" if published is None else f"{published:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _grouped(records: list[dict[str, Any]], keys: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return [sorted(group, key=lambda record: record["seed"]) for group in groups.values()]


def _mean(group: list[dict[str, Any]], figure: str) -> float:
    """Below all others where none has ended."""
    return fmean([record["summary"][figure] for record in _ended(group)] or [-1.0])


def _percent(group: list[dict[str, Any]], figure: str) -> str:
    return percent([record["summary"][figure] for record in _ended(group)])


def _ended(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in group if "failed" not in record["summary"]]


def _number(group: list[dict[str, Any]]) -> str:
    """Of runs that have ended, and of those that have not."""
    failed = len(group) - len(_ended(group))
    return str(len(group) - failed) + (f", and {failed} diverged" if failed else "")
