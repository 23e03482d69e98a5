"""Leave-one-domain-out: accuracy on the domain that had no client, by method and by domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from batchless.report.escape import markdown_text
from batchless.report.federated_names import method_names
from batchless.report.federated_table import MEAN, MOMENTS, WITHOUT_EFFECT, Method, Moment, method_of, unseen_domains
from batchless.runs import Run

if TYPE_CHECKING:
    from rich.table import Table

_UNSEEN = "data.unseen_domains"


@dataclass(frozen=True, kw_only=True)
class UnseenComparison:
    """Methods (in the order first seen) by the one domain that a run trained without.

    Attributes:
        methods: the rows.
        domains: the columns; the mean over them is one more.
        cells: the runs of a method without a domain, which differ by the seed only.
    """

    methods: tuple[str, ...]
    domains: tuple[str, ...]
    cells: Mapping[tuple[str, str], Method]

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The rounds there are accuracies of. The chosen one is chosen on the domains that have clients."""
        chosen = any(cell.score(moment="chosen").n for cell in self.cells.values())
        return ("last", "chosen") if chosen else ("last",)

    def head(self, moment: Moment) -> list[str]:
        """Return the names of the columns."""
        return [f"test accuracy on the unseen domain, %, {MOMENTS[moment]}", *self.domains, MEAN]

    def rows(self, moment: Moment) -> list[list[str]]:
        """Return one row per method; the mean is there where every domain was left out by a run that has ended."""
        return [
            [name, *(self._cell(name, d, moment) for d in self.domains), self._mean(name, moment)]
            for name in self.methods
        ]

    def accuracies(self, name: str, moment: Moment) -> dict[str, float | None]:
        """Return a method's mean over seeds on each domain, 0 to 1."""
        cells = {domain: self.cells.get((name, domain)) for domain in self.domains}
        return {
            domain: None if cell is None else cell.score(domain, moment=moment).mean for domain, cell in cells.items()
        }

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        parts = []
        for moment in self.moments:
            lines = [[markdown_text(text) for text in line] for line in (self.head(moment), *self.rows(moment))]
            lines.insert(1, ["---", *("---:" for _ in lines[0][1:])])
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(parts) + "\n"

    def rich(self) -> "Table":
        """Return the accuracies of the last round as a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Leave-one-domain-out, last round", title_justify="left")
        first, *others = self.head("last")
        table.add_column(first.rpartition(",")[0])
        for column in others:
            table.add_column(Text(column), justify="right")
        for row in self.rows("last"):
            table.add_row(*map(Text, row))
        return table

    def findings(self) -> list[str]:
        """Return one sentence: each method's mean over the domains at the last round, where all were left out."""
        found = {name: self._mean(name, "last") for name in self.methods}
        said = [f"{name} {mean} %" for name, mean in found.items() if mean != "-"]
        over = f"On domains without a client (each of {len(self.domains)} left out in turn, last round), mean test accuracy"
        return [f"{over}: {', '.join(said)}."] if said else []

    def _cell(self, name: str, domain: str, moment: Moment) -> str:
        cell = self.cells.get((name, domain))
        if cell is None:
            return "-"
        found = cell.score(domain, moment=moment).percent()
        return f"{found or '-'}{f' ({cell.trouble()})' if cell.trouble() else ''}"

    def _mean(self, name: str, moment: Moment) -> str:
        values = [value for value in self.accuracies(name, moment).values() if value is not None]
        return f"{100 * fmean(values):.1f}" if len(values) == len(self.domains) else "-"


def unseen_comparison(runs: Sequence[Run]) -> UnseenComparison | None:
    """Group the federated runs that trained without one domain by method and domain.

    Args:
        runs: federated ones, see `federated_comparison`; those with no unseen domain, or with several, are not counted.

    Returns:
        None unless two domains or more were left out, each in a run of its own.
    """
    single = {id(run): left[0] for run in runs if len(left := unseen_domains(run)) == 1}
    chosen = [run for run in runs if id(run) in single]
    domains = tuple(dict.fromkeys(single[id(run)] for run in chosen))
    if len(domains) < 2:
        return None
    names = method_names(chosen, ignore=(*WITHOUT_EFFECT, _UNSEEN))
    groups: dict[tuple[str, str], list[Run]] = {}
    for run, name in zip(chosen, names, strict=True):
        groups.setdefault((name, single[id(run)]), []).append(run)
    return UnseenComparison(
        methods=tuple(dict.fromkeys(names)),
        domains=domains,
        cells={key: method_of(key[0], group) for key, group in groups.items()},
    )
