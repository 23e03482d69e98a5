"""Runs side by side: accuracy and speed by normalizer and by images per forward, with spread, n, and what differs."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchless.report.escape import markdown_text
from batchless.report.likeness import shared_config, unlike
from batchless.report.main_figure import ACCURACY, MainFigure, common_figure, main_figure
from batchless.report.sample import Sample, trouble
from batchless.runs import Run, number

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Cell(Sample):
    """The runs of one normalizer at one number of images per forward.

    Attributes:
        normalizer: its name.
        images_per_forward: the micro-batch.
        speeds: images per second of the runs that have an accuracy, as far as they say.
        memories: peak memory in bytes of those runs, as far as they say.
        waits: shares of their training time in which they waited for data, as far as they say.
        failures: for each run that could not be done, why.
        unfinished: how many runs have not ended.
    """

    normalizer: str
    images_per_forward: int
    speeds: tuple[float, ...]
    memories: tuple[float, ...]
    waits: tuple[float, ...]
    failures: tuple[str, ...]
    unfinished: int

    @property
    def speed(self) -> float | None:
        """Mean images per second; None without one."""
        return statistics.fmean(self.speeds) if self.speeds else None

    @property
    def memory(self) -> float | None:
        """Largest peak memory in bytes; None without one."""
        return max(self.memories, default=None)

    @property
    def wait(self) -> float | None:
        """Mean share of the training time spent waiting for data; None without one."""
        return statistics.fmean(self.waits) if self.waits else None

    def trouble(self) -> str:
        """Say what did not come to an accuracy: the reasons, and how many runs of how many; empty if all did."""
        return trouble(self.n, self.failures, self.unfinished)

    def text(self) -> str:
        """Return the cell as one line: `71.2 +- 0.8 (n=3)`, in percent, with any trouble after it."""
        if self.mean is None:
            return self.trouble()
        after = f"; {self.trouble()}" if self.trouble() else ""
        return f"{self.percent()} (n={self.n}){after}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Cells by normalizer (in the order first seen) and by images per forward (ascending).

    Attributes:
        normalizers: the rows.
        sizes: the columns, images per forward.
        cells: row by row; a combination nobody ran has none.
        shared: the configuration all runs have in common, dotted keys.
        warnings: one line per way in which the runs are not like for like.
        figure: what the runs' task is judged by; "accuracy" stands for it in the names here.
    """

    normalizers: tuple[str, ...]
    sizes: tuple[int, ...]
    cells: tuple[Cell, ...]
    shared: Mapping[str, Any]
    warnings: tuple[str, ...]
    figure: MainFigure = ACCURACY

    def cell(self, normalizer: str, images_per_forward: int) -> Cell | None:
        """Return the cell of a row and a column, None if nobody ran it."""
        wanted = (normalizer, images_per_forward)
        return next((cell for cell in self.cells if (cell.normalizer, cell.images_per_forward) == wanted), None)

    def markdown(self) -> str:
        """Return the accuracies as a Markdown table, mean +- sample standard deviation in percent, and the warnings."""
        head = [f"{self.figure.title}, % / images per forward", *map(str, self.sizes)]
        lines = [head, ["---", *("---:" for _ in self.sizes)]]
        lines += [
            [markdown_text(name), *(markdown_text(self._text(name, size)) for size in self.sizes)]
            for name in self.normalizers
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([table, *(markdown_text(warning) for warning in self.warnings)]) + "\n"

    def rich(self, *, title: str = "") -> "Table":
        """Return the accuracies as a table for the terminal, the warnings below it."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None, caption_justify="left")
        table.caption = Text("\n".join(self.warnings), style="yellow") if self.warnings else None
        table.add_column(f"{self.figure.title}, %\nimages per forward")
        for size in self.sizes:
            table.add_column(f"\n{size}", justify="right")
        for name in self.normalizers:  # Text: square brackets in a name are no markup
            table.add_row(Text(name), *(Text(self._text(name, size)) for size in self.sizes))
        return table

    def _text(self, normalizer: str, images_per_forward: int) -> str:
        cell = self.cell(normalizer, images_per_forward)
        return "-" if cell is None else cell.text()


def comparison(runs: Sequence[Run], *, ignore: Collection[str] = ("out",)) -> Comparison:
    """Group `runs` by normalizer and images per forward.

    Args:
        runs: at least one; each configuration has `normalizer`, `images_per_forward`, `seed`.
        ignore: dotted configuration keys which may differ without a word, such as where a run was written.

    Raises:
        ValueError: no runs, runs of several tasks, or a run without those keys or with a test accuracy that is none.
    """
    if not runs:
        raise ValueError("there are no runs to compare; give at least one run folder")
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((_normalizer(run), _images_per_forward(run)), []).append(run)
    normalizers = tuple(dict.fromkeys(normalizer for normalizer, _ in groups))
    sizes = tuple(sorted({size for _, size in groups}))
    keys = [(name, size) for name in normalizers for size in sizes if (name, size) in groups]
    return Comparison(
        normalizers=normalizers,
        sizes=sizes,
        cells=tuple(_cell(name, size, groups[name, size]) for name, size in keys),
        shared=shared_config(runs),
        warnings=tuple(unlike(runs, ignore=ignore)),
        figure=common_figure(runs),
    )


def _cell(normalizer: str, images_per_forward: int, runs: Iterable[Run]) -> Cell:
    accuracies, seeds, failures, unfinished = [], [], [], 0
    figures: dict[str, list[float]] = {"images_per_second": [], "peak_memory_bytes": [], "waiting_share": []}
    for run in runs:
        if run.summary is None:
            unfinished += 1
        elif "failed" in run.summary:
            failures.append(str(run.summary["failed"]))
        elif (accuracy := checked_accuracy(run, run.summary)) is None:
            figure = main_figure(run)
            failures.append(f"its {figure.title} is {run.summary[f'test_{figure.name}']}")
        else:
            accuracies.append(accuracy)
            seeds.append(seed_of(run))
            for key, values in figures.items():
                values += [] if (value := number(run.summary.get(key))) is None else [value]
    return Cell(
        normalizer=normalizer,
        images_per_forward=images_per_forward,
        accuracies=tuple(accuracies),
        seeds=tuple(seeds),
        speeds=tuple(figures["images_per_second"]),
        memories=tuple(figures["peak_memory_bytes"]),
        waits=tuple(figures["waiting_share"]),
        failures=tuple(failures),
        unfinished=unfinished,
    )


def checked_accuracy(run: Run, summary: Mapping[str, Any]) -> float | None:
    """Return the run's main test figure; None if it is not finite. ValueError if it is missing or no share."""
    key = f"test_{main_figure(run).name}"
    if key not in summary:
        raise ValueError(f"{run.path / 'summary.json'} has neither {key} nor failed; was it written by a run?")
    accuracy = number(summary[key])
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"{run.path / 'summary.json'}: {key} is {accuracy:g}; it is a share from 0 to 1")
    return accuracy


def _normalizer(run: Run) -> str:
    value = run.config.get("normalizer")
    if not isinstance(value, str):
        raise ValueError(f"{run.path / 'config.yaml'}: normalizer is {value!r}; its name is needed to compare the run")
    return value


def _images_per_forward(run: Run) -> int:
    value = run.config.get("images_per_forward")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{run.path / 'config.yaml'}: images_per_forward is {value!r}; "
            "a whole number from 1 is needed to compare the run"
        )
    return value


def seed_of(run: Run) -> int | None:
    """Return the seed of a run; None if it is no whole number."""
    seed = run.config.get("seed")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None
