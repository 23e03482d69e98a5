"""Everything a report says, of all kinds of runs, gathered from run folders once; each format only writes it down."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchless.report.commands import recorded_commands, repetition
from batchless.report.contents import Contents, gather_trained
from batchless.report.federated_contents import FederatedContents, gather_federated
from batchless.report.halves import compare_runs, controls, split
from batchless.report.timings import Benchmark
from batchless.runs import Run


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report says.

    Attributes:
        title: the heading.
        findings: sentences before the numbers.
        runs: what is compared.
        trained: about runs of `batchless train`; None without any.
        federated: about runs of `batchless federate`; None without any.
        benchmarks: the tables of `python -m bench`.
        commands: how the report was made.
        recorded: how the runs were made, and how many runs by each command.
        repetition: a command that repeats the first run.
    """

    title: str
    findings: tuple[str, ...]
    runs: tuple[Run, ...]
    trained: Contents | None
    federated: FederatedContents | None
    benchmarks: tuple[Benchmark, ...]
    commands: tuple[str, ...]
    recorded: tuple[tuple[str, int], ...]
    repetition: str

    @property
    def halves(self) -> list[Contents | FederatedContents]:
        """Those that are there."""
        return [half for half in (self.trained, self.federated) if half is not None]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is missing or damaged in the run folders."""
        return tuple(note for half in self.halves for note in half.notes)


def gather(
    runs: Sequence[Run], *, title: str, findings: Sequence[str], commands: Sequence[str], control: str | None
) -> Report:
    """Read what the run folders hold beside the runs themselves, and compare those of each kind.

    Args:
        runs: at least one, see `comparison` and `federated_comparison`.
        title: the heading.
        findings: sentences shown before the numbers, such as those of `claims`.
        commands: the exact commands that made the report.
        control: what all are compared with, see `choose_control` and `choose_method`; with runs of both kinds it is for the
            kind that has it.

    Raises:
        ValueError: the runs cannot be compared, or the control was not run.
    """
    compared = compare_runs(runs)
    ordinary_control, federated_control = controls(compared, control)
    trained, federated, _ = split(runs)
    recorded = [(command, count) for command, count in recorded_commands(runs) if command not in commands]
    return Report(
        title=title,
        findings=tuple(findings),
        runs=tuple(runs),
        trained=gather_trained(trained, control=ordinary_control) if trained else None,
        federated=gather_federated(federated, control=federated_control) if federated else None,
        benchmarks=compared.benchmarks,
        commands=tuple(commands),
        recorded=tuple(recorded),
        repetition=repetition(runs[0]),
    )
