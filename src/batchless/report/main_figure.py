"""What a task is judged by: the one figure of a run that tables and charts show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchless.runs import Run


@dataclass(frozen=True)
class MainFigure:
    """A share from 0 to 1, shown in percent.

    Attributes:
        name: in `summary.json` (with `test_` before it) and in `metrics.jsonl`.
        word: in a sentence.
    """

    name: str
    word: str

    @property
    def title(self) -> str:
        """At an axis or over a column."""
        return f"test {self.word}"


ACCURACY = MainFigure("accuracy", "accuracy")
_OF_TASK: Mapping[object, MainFigure] = {
    "classify": ACCURACY,
    "detect": MainFigure("ap", "AP"),
    "segment": MainFigure("miou", "mIoU"),
    "video": ACCURACY,
}


def main_figure(run: Run) -> MainFigure:
    """The figure of the run's task; runs from before there were tasks are of classification."""
    return _OF_TASK.get(run.config.get("task", "classify"), ACCURACY)


def common_figure(runs: Sequence[Run]) -> MainFigure:
    """The figure of all runs; ValueError if they are of several tasks, which have nothing to compare."""
    figures = {main_figure(run): run for run in runs}
    if len(figures) > 1:
        found = ", ".join(f"{figure.word} in {run.path}" for figure, run in figures.items())
        raise ValueError(f"the runs are of several tasks ({found}): compare those of one task at a time")
    return next(iter(figures))
