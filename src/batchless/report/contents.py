"""Everything a report says about runs of `batchless train`, gathered once; each format only writes it down."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchless.report.conversions import Conversion, read_conversions
from batchless.report.curves import LearningCurves, learning_curves
from batchless.report.difference import Difference, choose_control, difference
from batchless.report.likeness import varied
from batchless.report.pictures import Gallery, read_galleries
from batchless.report.table import Cell, Comparison, comparison
from batchless.runs import Run


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a report says about runs of `batchless train`.

    Attributes:
        runs: what is compared.
        table: their cells.
        control: the cell all others are compared with.
        differences: for each cell of the table, its difference from the control; None for the control and where
            there is nothing to compare.
        learning: the learning curves, if anything was logged.
        varied: configuration keys that differ, a value, and the runs that have it.
        conversions: what the normalizers did to the network.
        galleries: sample predictions.
        notes: what is missing or damaged in the run folders.
    """

    runs: tuple[Run, ...]
    table: Comparison
    control: Cell
    differences: tuple[Difference | None, ...]
    learning: LearningCurves | None
    varied: tuple[tuple[str, str, str], ...]
    conversions: tuple[Conversion, ...]
    galleries: tuple[Gallery, ...]
    notes: tuple[str, ...]

    @property
    def control_has_accuracy(self) -> bool:
        """Whether there is anything to compare with."""
        return self.control.mean is not None

    @property
    def control_name(self) -> str:
        """The control in words."""
        size = self.control.images_per_forward
        return f"{self.control.normalizer} at {size} {'image' if size == 1 else 'images'} per forward"


def gather_trained(runs: Sequence[Run], *, control: str | None) -> Contents:
    """Read what the run folders hold beside the runs themselves, and compare.

    Args:
        runs: at least one, see `comparison`.
        control: what all are compared with, see `choose_control`.

    Raises:
        ValueError: the runs cannot be compared, or the control was not run. Files that are missing or damaged, other
            than the runs themselves, become notes.
    """
    table = comparison(runs)
    chosen = choose_control(table, control)
    conversions, lacking = read_conversions(runs)
    galleries, refused = read_galleries(runs)
    return Contents(
        runs=tuple(runs),
        table=table,
        control=chosen,
        differences=tuple(None if cell is chosen else difference(cell, chosen) for cell in table.cells),
        learning=learning_curves(runs),
        varied=tuple(varied(runs)),
        conversions=tuple(conversions),
        galleries=tuple(galleries),
        notes=(*lacking, *refused),
    )
