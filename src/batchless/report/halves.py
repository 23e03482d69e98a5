"""Runs of all kinds: `batchless train`'s and `batchless federate`'s are compared each among themselves, benchmarks shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from batchless.report.claims import claims
from batchless.report.commands import is_federated
from batchless.report.difference import choose_control
from batchless.report.federated_claims import federated_claims
from batchless.report.federated_contents import choose_method
from batchless.report.federated_table import FederatedComparison, federated_comparison
from batchless.report.table import Comparison, comparison
from batchless.report.timings import Benchmark, is_bench, read_benchmarks
from batchless.report.unseen_table import UnseenComparison, unseen_comparison
from batchless.runs import Run

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Halves:
    """The comparisons of some runs: of those trained in one place, and of those trained by a federation.

    Attributes:
        trained: None if there are no such runs.
        federated: None if there are no such runs.
        benchmarks: those of `python -m bench`; one of the three is there.
        unseen: of the federated ones that left one domain out; None unless they left out several in turn.
    """

    trained: Comparison | None
    federated: FederatedComparison | None
    unseen: UnseenComparison | None = None
    benchmarks: tuple[Benchmark, ...] = ()

    @property
    def tables(self) -> list[Comparison | FederatedComparison]:
        """The halves that are there."""
        return [table for table in (self.trained, self.federated) if table is not None]

    def findings(self, *, control: str | None = None) -> list[str]:
        """Return what the numbers say: the sentences of `claims` and of `federated_claims`, what both say once, at the end."""
        _, federated_control = controls(self, control)
        ordinary = [] if self.trained is None else claims(self.trained)
        federated = [] if self.federated is None else federated_claims(self.federated, control=federated_control)
        return [sentence for sentence in ordinary if sentence not in federated] + federated

    def markdown(self) -> str:
        """Return the tables as Markdown, with their warnings."""
        more = [] if self.unseen is None else [self.unseen]
        return "\n".join(table.markdown() for table in (*self.tables, *more, *self.benchmarks))

    def rich(self, *, title: str = "") -> "Table | Group":
        """Return the tables for the terminal."""
        from rich.console import Group

        drawn: list[Table | Group] = [table.rich(title=title) for table in self.tables]
        drawn += [] if self.unseen is None else [self.unseen.rich()]
        drawn += [benchmark.rich() for benchmark in self.benchmarks]
        return drawn[0] if len(drawn) == 1 else Group(*drawn)


def split(runs: Sequence[Run]) -> tuple[list[Run], list[Run], list[Run]]:
    """Return the runs of `batchless train`, those of `batchless federate`, and those of `python -m bench`."""
    learned = [run for run in runs if not is_bench(run)]
    federated = [run for run in learned if is_federated(run)]
    return [run for run in learned if not is_federated(run)], federated, [run for run in runs if is_bench(run)]


def compare_runs(runs: Sequence[Run]) -> Halves:
    """Compare runs of one kind or several.

    Args:
        runs: at least one, see `comparison` and `federated_comparison`.

    Raises:
        ValueError: no runs, or a run that cannot be compared or read.
    """
    trained, federated, benchmarks = split(runs)
    table = federated_comparison(federated) if federated else None
    return Halves(
        trained=comparison(trained) if trained or not runs else None,
        federated=table,
        unseen=None if table is None else unseen_comparison(table),
        benchmarks=read_benchmarks(benchmarks),
    )


def controls(halves: Halves, wanted: str | None) -> tuple[str | None, str | None]:
    """Return the control of each half: `wanted` where it was run, otherwise that half's own choice.

    Raises:
        ValueError: it was run in neither.
    """
    if wanted is not None and not halves.tables:
        raise ValueError(f"control is {wanted!r}, but benchmarks have a base of their own: leave --control out")
    if wanted is None or len(halves.tables) == 1:
        return wanted, wanted
    assert halves.trained is not None
    assert halves.federated is not None
    found: list[str | None] = []
    errors: list[ValueError] = []
    for choose in (partial(choose_control, halves.trained), partial(choose_method, halves.federated)):
        try:
            choose(wanted)
            found.append(wanted)
        except ValueError as error:
            found.append(None)
            errors.append(error)
    if len(errors) == 2:
        raise ValueError(f"{errors[0]}; of the federated runs: {errors[1]}")
    return found[0], found[1]
