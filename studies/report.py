"""The tables of docs/results.md, from what the studies have kept."""

import sys
from collections import defaultdict
from typing import Any

from batchless.nn import parse_normalizer
from batchless.nn.normalizer import Bcn, BcnMicro, Bn
from batchless.report.table import Cell
from studies import office_caltech, tasks
from studies.cifar10 import RESULTS
from studies.figures import points
from studies.office_report import federated_tables
from studies.running import kept
from studies.task_report import task_tables

_CONTROLS = (("bn", 64), ("bn", 2))


def main() -> int:
    """Print one Markdown table for each number of epochs, then those of the other studies; 1 if there is nothing yet."""
    federated, of_tasks = kept(office_caltech.RESULTS), kept(tasks.RESULTS)
    if not (RESULTS.exists() or federated or of_tasks):
        print(f"there is no {RESULTS} yet: run python -m studies.cifar10", file=sys.stderr)
        return 1
    records = kept(RESULTS).values()
    for epochs in sorted({record["epochs"] for record in records}):
        print("\n".join(_table([record for record in records if record["epochs"] == epochs], epochs)))
    for table in [*task_tables(of_tasks), *federated_tables(federated)]:
        print("\n".join(table))
    return 0


def _table(records: list[dict[str, Any]], epochs: int) -> list[str]:
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        grouped[record["normalizer"], record["images_per_forward"]].append(record)
    cells = {key: _cell(key, group) for key, group in grouped.items()}
    controls = [cells[key] for key in _CONTROLS if key in cells]
    titles = [f"minus `{c.normalizer}` at {c.images_per_forward} (95 %)" for c in controls]
    lines = [
        f"{epochs} epochs of 10,000 images, test accuracy in percent:",
        "",
        " | ".join(["| normalizer", "images per forward", "n", "mean", "sd", *titles]) + " |",
        "|---|---:|---:|---:|---:|" + "---|" * len(titles),
    ]
    for cell in sorted(cells.values(), key=lambda cell: -(cell.mean or 0)):
        lines.append(" | ".join(["| " + f"`{cell.normalizer}`", *_numbers(cell, controls)]) + " |")
    return [*lines, ""]


def _cell(key: tuple[str, int], records: list[dict[str, Any]]) -> Cell:
    records = sorted(records, key=lambda record: record["seed"])
    return Cell(
        normalizer=key[0],
        images_per_forward=key[1],
        accuracies=tuple(record["summary"]["test_accuracy"] for record in records),
        seeds=tuple(record["seed"] for record in records),
        speeds=(),  # all micro-batches of a step ran together
        memories=(),
        waits=(),
        failures=(),
        unfinished=0,
    )


def _numbers(cell: Cell, controls: list[Cell]) -> list[str]:
    mean, sd = cell.mean, cell.sd
    assert mean is not None, "only runs that have ended are kept"
    size = str(cell.images_per_forward) if _sees_micro_batches(cell.normalizer) else "any"
    words = [size, str(cell.n), f"{100 * mean:.1f}", "" if sd is None else f"{100 * sd:.1f}"]
    return words + ["" if control is cell else points(cell, control) for control in controls]


def _sees_micro_batches(normalizer: str) -> bool:
    """Whether what is trained depends on how a step's images are cut into micro-batches."""
    act = parse_normalizer(normalizer).act
    return isinstance(act, Bn | Bcn) or (isinstance(act, BcnMicro) and act.update == "forward")


if __name__ == "__main__":
    sys.exit(main())
