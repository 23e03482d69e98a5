"""Benchmarks in a report: the tables that `python -m bench NAME --out FOLDER` has left, as it printed them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchless.report.escape import markdown_table, markdown_text
from batchless.report.optional import read_optional
from batchless.runs import Run

if TYPE_CHECKING:
    from rich.console import Group

BENCH = "bench"
"""The `kind` of a benchmark's configuration."""
COMPARISONS = "comparisons.json"
"""A list of mappings: title, tables (rows of texts, the first one a head), notes, and every single time."""

Table = tuple[tuple[str, ...], ...]


def is_bench(run: Run) -> bool:
    """Whether a benchmark made the run."""
    return run.config.get("kind") == BENCH


def machine_line(environment: Mapping[str, object]) -> str:
    """The machine and the versions that times depend on, in one line."""
    allocator = environment.get("allocator")
    return (
        f"{environment.get('cpu')}, {environment.get('cores')} cores, {environment.get('torch_threads')} threads used, "
        f"torch {environment.get('torch')}, timm {environment.get('timm')}{f', {allocator}' if allocator else ''}"
    )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One comparison of a benchmark.

    Attributes:
        title: what was timed.
        tables: contestants, then targets with their verdicts; a head and rows each.
        notes: what else was found.
    """

    title: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark's run folder.

    Attributes:
        run: the folder.
        timings: its comparisons.
        lines: the machine and its load, and whether the benchmark failed or has not ended.
    """

    run: Run
    timings: tuple[Timing, ...]
    lines: tuple[str, ...]

    @property
    def title(self) -> str:
        """Its command in short."""
        return f"bench {self.run.config.get('benchmark')}"

    def markdown(self) -> str:
        """Return the tables as Markdown, with what limits them."""
        parts = [f"## {markdown_text(self.title)}", *map(markdown_text, self.lines)]
        for timing in self.timings:
            parts.append(f"### {markdown_text(timing.title)}")
            parts += [markdown_table(head, rows) for head, *rows in timing.tables]
            parts += map(markdown_text, timing.notes)
        return "\n\n".join(parts) + "\n"

    def rich(self) -> "Group":
        """Return the tables for the terminal."""
        from rich.console import Group
        from rich.table import Table as Drawn
        from rich.text import Text

        parts: list[Text | Drawn] = [Text("\n".join([self.title, *self.lines]))]
        for timing in self.timings:
            for number, (head, *rows) in enumerate(timing.tables):
                drawn = Drawn(title=None if number else Text(timing.title), title_justify="left")
                for column, name in enumerate(head):
                    drawn.add_column(Text(name), justify="right" if column else "left")
                for row in rows:
                    drawn.add_row(*map(Text, row))
                parts.append(drawn)
            parts += map(Text, timing.notes)
        return Group(*parts)


def read_benchmarks(runs: Sequence[Run]) -> tuple[Benchmark, ...]:
    """Read the tables of benchmarks' run folders.

    Raises:
        ValueError: a folder's tables are damaged.
    """
    return tuple(Benchmark(run=run, timings=_timings(run), lines=_lines(run)) for run in runs)


def _timings(run: Run) -> tuple[Timing, ...]:
    file = run.path / COMPARISONS
    found = read_optional(file)
    try:
        return tuple(map(_timing, [] if found is None else found))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged: it holds no tables as `python -m bench --out` writes them") from error


def _timing(told: Any) -> Timing:
    tables = tuple(tuple(tuple(map(str, row)) for row in table) for table in told["tables"])
    if any(not table or len({len(row) for row in table}) > 1 for table in tables):
        raise ValueError("a table without a head, or with rows of several lengths")
    return Timing(title=str(told["title"]), tables=tables, notes=tuple(map(str, told["notes"])))


def _lines(run: Run) -> tuple[str, ...]:
    ended = "not finished" if run.summary is None else run.summary.get("load", f"failed: {run.summary.get('failed')}")
    return (f"{machine_line(run.environment)}, {run.config.get('clock')} clock", str(ended))
