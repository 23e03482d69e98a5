"""Everything a report says about federated runs, gathered once; each format only writes it down."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchless.report.conversions import Conversion, read_conversions
from batchless.report.difference import Difference, difference
from batchless.report.federated_curves import SHARE, Convergence, convergence
from batchless.report.federated_names import algorithm_name
from batchless.report.federated_partition import Partition, read_partitions
from batchless.report.federated_table import (
    WITHOUT_EFFECT,
    FederatedComparison,
    Method,
    Moment,
    compared_keys,
    federated_comparison,
)
from batchless.report.likeness import varied
from batchless.report.unseen_table import UnseenComparison, unseen_comparison
from batchless.runs import Run

SHARING = "sharing.txt"
MOST_SHARING = 20_000  # characters of it


@dataclass(frozen=True, kw_only=True)
class FederatedContents:
    """What a report says about federated runs.

    Attributes:
        runs: what is compared.
        table: their accuracies, by method and domain.
        control: the method all others are compared with, each with its runs that left out the same domains; its first row.
        differences: of each row and column of the table from the control, at the last and at the chosen round; None where
            there is nothing to compare.
        unseen: accuracies on domains that were left out in turn; None if none were.
        level: the accuracy in percent that methods are timed by; None if the control has none.
        convergence: when each method that left out the same domains as the control's first row first reached it.
        partitions: who held which images.
        left_out: method, seed, client, reason, and the rounds it was left out of.
        sharing: of each method, what its first run told of the tensors that are shared.
        varied: configuration keys that differ, a value, and the runs that have it.
        conversions: what the normalizers did to the network.
        notes: what is missing or damaged in the run folders.
    """

    runs: tuple[Run, ...]
    table: FederatedComparison
    control: Method
    differences: dict[tuple[str, Moment, str], Difference | None]
    unseen: UnseenComparison | None
    level: float | None
    convergence: tuple[Convergence, ...]
    partitions: tuple[Partition, ...]
    left_out: tuple[tuple[str, str, str, str, tuple[str, ...]], ...]
    sharing: tuple[tuple[str, str], ...]
    varied: tuple[tuple[str, str, str], ...]
    conversions: tuple[Conversion, ...]
    notes: tuple[str, ...]

    @property
    def control_name(self) -> str:
        """The control in words."""
        return self.control.kind

    @property
    def control_note(self) -> str:
        """Which row of the control each row is compared with, where that is to be said."""
        return (
            "Each row is compared with the control's that left out the same domains."
            if len(self.table.left_out) > 1
            else ""
        )

    def is_control(self, method: Method) -> bool:
        """Whether a row of the table is the control's."""
        return method.kind == self.control.kind

    @property
    def control_has_accuracy(self) -> bool:
        """Whether there is anything to compare with."""
        return any(method.score().n for method in self.table.methods if self.is_control(method))

    @property
    def level_text(self) -> str:
        """What the table of convergence counts to."""
        return (
            f"Until the mean test accuracy over the domains first reached {self.level or 0.0:.1f} %, {100 * SHARE:.0f} % of "
            f"what {self.control.name} has at the last round: means over the runs that got there."
        )


def gather_federated(runs: Sequence[Run], *, control: str | None) -> FederatedContents:
    """Read what the folders of federated runs hold beside the runs themselves, and compare.

    Args:
        runs: at least one, see `federated_comparison`.
        control: what all are compared with, see `choose_method`.

    Raises:
        ValueError: the runs cannot be compared, or the control was not run.
    """
    table = federated_comparison(runs)
    chosen = choose_method(table, control)
    mean = chosen.score().mean
    level = None if mean is None else 100 * SHARE * mean
    timed = [method for method in table.methods if method.unseen() == chosen.unseen()]
    partitions, unread = read_partitions(runs)
    conversions, lacking = read_conversions(runs)
    names = {id(run): method.name for method in table.methods for run in method.runs}
    return FederatedContents(
        runs=tuple(runs),
        table=table,
        control=chosen,
        differences={
            (method.name, moment, column): difference(
                method.score(column, moment=moment), base.score(column, moment=moment)
            )
            for method in table.methods
            if method.kind != chosen.kind and (base := table.alike(method, chosen.kind)) is not None
            for moment in table.moments
            for column in table.columns
        },
        unseen=unseen_comparison(table),
        level=level,
        convergence=() if level is None else tuple(convergence(timed, percent=level)),
        partitions=tuple(partitions),
        left_out=tuple(_left_out(table)),
        sharing=tuple(_sharing(table)),
        varied=tuple(
            varied(runs, ignore=WITHOUT_EFFECT, compared=compared_keys(runs), name=lambda run: names[id(run)])
        ),
        conversions=tuple(conversions),
        notes=(*unread, *lacking),
    )


def _left_out(table: FederatedComparison) -> Iterator[tuple[str, str, str, str, tuple[str, ...]]]:
    for method in table.methods:
        rounds: dict[tuple[str, str, str], dict[str, None]] = {}
        for run in method.runs:
            for record in run.metrics:
                if record.get("kind") == "left_out":
                    key = (str(run.config.get("seed", "")), str(record.get("client")), str(record.get("reason")))
                    rounds.setdefault(key, {})[str(record.get("round"))] = None
        for (seed, client, reason), found in rounds.items():
            yield method.name, seed, client, reason, tuple(found)


def _sharing(table: FederatedComparison) -> Iterator[tuple[str, str]]:
    for method in table.methods:
        try:
            text = (method.runs[0].path / SHARING).read_text("utf-8", errors="replace")
        except OSError:
            continue  # an older run: the report is whole without it
        yield method.name, text[:MOST_SHARING].rstrip()


def choose_method(table: FederatedComparison, wanted: str | None = None) -> Method:
    """Return the method that all others are compared with.

    Args:
        table: the methods to choose from.
        wanted: the name of a method or row as the table has it, or of an algorithm (its first method); None: `fedavg` with
            batch normalization if it was run, then any `fedavg`, else the first.

    Returns:
        Its first row.

    Raises:
        ValueError: nothing of that name was run.
    """
    by_name = {kind: next(each for each in table.methods if each.kind == kind) for kind in table.kinds}
    by_name |= {method.name: method for method in table.methods}
    by_algorithm: dict[str | None, Method] = {}
    for method in table.methods:
        by_algorithm.setdefault(algorithm_name(method.runs[0].config), method)
    if wanted is None:
        plain = [method for method in table.methods if method.runs[0].config.get("normalizer") in ("bn", None)]
        usual = next((one for one in plain if algorithm_name(one.runs[0].config) == "fedavg"), None)
        return usual or by_algorithm.get("fedavg") or table.methods[0]
    found = by_name.get(wanted) or by_algorithm.get(wanted)
    if found is None:
        raise ValueError(f"control is {wanted!r}, which was not run; give one of {'; '.join(by_name)}")
    return found
