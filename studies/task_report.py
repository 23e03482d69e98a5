"""The tables of the study of tasks: a row for each normalizer, and what was published on the full data sets.

Cells share their processor with others, so their images/s are not shown: `python -m bench tasks` times the same steps.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from batchless.report.sample import Sample
from studies.figures import percent, points
from studies.task_cells import NORMALIZERS, PROBLEMS, Problem
from studies.task_published import PUBLISHED, published_table

_WORDS = {
    "miou": "mIoU",
    "pixel_accuracy": "pixels right",
    "accuracy": "top-1",
    "ap": "box AP",
    "ap50": "box AP50",
    "mask_ap": "mask AP",
}
_CONTROL = ("bn", 2)


def task_tables(records: Mapping[str, Any]) -> Iterator[list[str]]:
    """For each task of which cells are kept a Markdown table, what to beware of in it, and apart what was published."""
    for problem in PROBLEMS.values():
        chosen = [record for record in records.values() if record["problem"] == problem.name]
        if chosen:
            yield [*_table(problem, chosen), problem.caution, "", *published_table(PUBLISHED[problem.name])]


def _table(problem: Problem, records: list[dict[str, Any]]) -> list[str]:
    words = [_WORDS[figure] for figure in problem.figures]
    titles = ["normalizer", "images per forward", "n", *words, f"{words[0]} minus `bn` at 2 (95 %)", "MiB"]
    groups = {
        key: [record for record in records if (record["normalizer"], record["images_per_forward"]) == key]
        for key in NORMALIZERS
    }
    return [
        f"{problem.about}, {problem.images:,} images:",
        "",
        f"| {' | '.join(titles)} |",
        f"|---|---:|---:|{'---:|' * len(words)}---|---:|",
        *(_row(problem, key, group, groups[_CONTROL]) for key, group in groups.items() if group),
        "",
    ]


def _row(problem: Problem, key: tuple[str, int], group: list[dict[str, Any]], control: list[dict[str, Any]]) -> str:
    done = [record["summary"] for record in group if "failed" not in record["summary"]]
    failed = [record["summary"]["failed"] for record in group if "failed" in record["summary"]]
    cells = [
        f"`{key[0]}`",
        str(key[1]),
        str(len(done)) + (f", and {len(failed)} failed: {failed[0]}" if failed else ""),
    ]
    cells += [percent([summary[f"test_{figure}"] for summary in done]) for figure in problem.figures]
    cells.append("control" if key == _CONTROL else points(_sample(problem, group), _sample(problem, control)))
    cells.append(f"{max(summary['peak_memory_bytes'] for summary in done) / 2**20:,.0f}" if done else "")
    return f"| {' | '.join(cells)} |"


def _sample(problem: Problem, group: list[dict[str, Any]]) -> Sample:
    done = sorted((record for record in group if "failed" not in record["summary"]), key=lambda record: record["seed"])
    return Sample(
        accuracies=tuple(record["summary"][f"test_{problem.figures[0]}"] for record in done),
        seeds=tuple(record["seed"] for record in done),
    )
