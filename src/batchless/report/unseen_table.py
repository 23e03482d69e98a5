"""Leave-one-domain-out: accuracy on the domain that had no client, by method and by domain."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from batchless.report.difference import difference, interval_text, points_text
from batchless.report.escape import markdown_text
from batchless.report.federated_table import AT, MEAN, MOMENTS, FederatedComparison, Method, Moment
from batchless.report.sample import Sample

if TYPE_CHECKING:
    from rich.table import Table


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

    def findings(self, *, control: str) -> list[str]:
        """Return what the numbers say of each method against `control`, over the domains that both left out.

        At the last round, and at the one chosen by validation. A control that left none out is replaced by the first method.
        """
        control = control if control in self.methods else self.methods[0]
        sentences = []
        for moment in self.moments:
            done = self._done(control, moment)
            if done:
                said = [self._against(name, control, moment) for name in self.methods if name != control]
                over = (
                    f"On {self._places(done)} without a client, each left out in turn, mean test accuracy {AT[moment]}"
                )
                mean = f"{control} {self._percent(control, done, moment)}"
                sentences.append(f"{over}: {'; '.join([mean, *said])}.")
        return sentences

    def score(self, name: str, domains: Collection[str], moment: Moment) -> Sample:
        """Return a method's means over `domains`, one for each seed that every one of them was left out with.

        One mean of all where the seeds are not the same for each domain; nothing where a domain was not left out.
        """
        scores = [
            cell.score(domain, moment=moment)
            for domain in domains
            if (cell := self.cells.get((name, domain))) is not None
        ]
        means = [score.mean for score in scores if score.mean is not None]
        if not means or len(means) < len(domains):
            return Sample(accuracies=(), seeds=())
        by_seed = [dict(zip(score.seeds, score.accuracies, strict=True)) for score in scores]
        seeds = tuple(by_seed[0])
        once = all(len(found) == score.n for found, score in zip(by_seed, scores, strict=True))
        if None in seeds or not once or any(found.keys() != by_seed[0].keys() for found in by_seed):
            return Sample(accuracies=(fmean(means),), seeds=(None,))
        return Sample(accuracies=tuple(fmean(found[seed] for found in by_seed) for seed in seeds), seeds=seeds)

    def _done(self, name: str, moment: Moment) -> tuple[str, ...]:
        """The domains that the method has an accuracy on."""
        found = self.accuracies(name, moment)
        return tuple(domain for domain in self.domains if found[domain] is not None)

    def _against(self, name: str, control: str, moment: Moment) -> str:
        own, wanted = self._done(name, moment), self._done(control, moment)
        both = tuple(domain for domain in wanted if domain in own)
        found = difference(self.score(name, both, moment), self.score(control, both, moment)) if both else None
        if found is None:
            return f"{name} has none there"
        where = "" if both == wanted else f"over {', '.join(both)} alone, where {control} has "
        where += self._percent(control, both, moment) + ", " if where else ""
        return f"{where}{name} {self._percent(name, both, moment)}, {points_text(found)}{interval_text(found)}"

    def _percent(self, name: str, domains: Collection[str], moment: Moment) -> str:
        score = self.score(name, domains, moment)
        assert score.mean is not None
        return f"{100 * score.mean:.1f} % (n = {score.n})"

    def _places(self, done: Collection[str]) -> str:
        return f"{len(done)} domains" if len(done) == len(self.domains) else ", ".join(done)

    def _cell(self, name: str, domain: str, moment: Moment) -> str:
        cell = self.cells.get((name, domain))
        if cell is None:
            return "-"
        found = cell.score(domain, moment=moment).percent()
        return f"{found or '-'}{f' ({cell.trouble()})' if cell.trouble() else ''}"

    def _mean(self, name: str, moment: Moment) -> str:
        values = [value for value in self.accuracies(name, moment).values() if value is not None]
        return f"{100 * fmean(values):.1f}" if len(values) == len(self.domains) else "-"


def unseen_comparison(table: FederatedComparison) -> UnseenComparison | None:
    """The rows of `table` that left out one domain, by method and domain; None unless two domains or more were left out so."""
    rows = [method for method in table.methods if len(method.unseen()) == 1]
    domains = tuple(dict.fromkeys(method.unseen()[0] for method in rows))
    if len(domains) < 2:
        return None
    return UnseenComparison(
        methods=tuple(dict.fromkeys(method.kind for method in rows)),
        domains=domains,
        cells={(method.kind, method.unseen()[0]): method for method in rows},
    )
