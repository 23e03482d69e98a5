"""The command `batchless`: trains, compares and shows."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchless.arguments import CompareConfig, parse_arguments
from batchless.demo import DemoConfig, run_demo
from batchless.report import claims, comparison, write_page
from batchless.runs import Run, find_runs, read_run
from batchless.tasks import TrainConfig, run_training

_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 2 for a mistake of the user's (told in one line), 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = f"batchless {shlex.join(words)}"
    try:
        match parse_arguments(words):
            case TrainConfig() as train:
                _train(train)
            case DemoConfig() as demo:
                _demo(demo, command)
            case CompareConfig() as compare:
                _compare(compare, command)
    except KeyboardInterrupt:
        print("batchless: stopped", file=sys.stderr)
        return _INTERRUPTED
    except ValueError as error:
        print(f"batchless: {' '.join(str(error).split())}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def _train(config: TrainConfig) -> None:
    from rich.console import Console

    console = Console()
    with _progress(console) as progress:
        bar = progress.add_task(f"{config.normalizer} at {config.images_per_forward}", total=config.images, figures="")

        def on_progress(images: int, figures: Mapping[str, float]) -> None:
            text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            progress.update(bar, completed=images, figures=text)

        trained = run_training(config, on_progress)
    console.print(comparison([read_run(trained.folder)]).rich())
    figures = trained.summary
    console.print(
        f"test accuracy {100 * figures['test_accuracy']:.1f} %, {figures['images_per_second']:.0f} images/s; "
        f"run folder {trained.folder}",
        markup=False,
        highlight=False,
    )


def _demo(config: DemoConfig, command: str) -> None:
    from rich.console import Console

    console = Console()
    started = time.perf_counter()
    total = len(config.runs())
    console.print(f"{total} runs of {config.train.images} images each, {config.train.model}", markup=False)
    with _progress(console) as progress:
        bar = progress.add_task("runs", total=total, figures="the first ones take longest")
        page, table, findings = run_demo(
            config,
            lambda what, done, _: progress.update(bar, completed=done, figures=what),
            commands=[command],
        )
    console.print(table.rich(title="Test accuracy"))
    for finding in findings:
        console.print(f"- {finding}", markup=False, highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s; report: {page.resolve()}", markup=False, highlight=False)


def _compare(config: CompareConfig, command: str) -> None:
    from rich.console import Console

    runs: list[Run] = [run for folder in config.folders for run in find_runs(folder)]
    if not runs:
        raise ValueError(f"no run folder in {', '.join(config.folders)}: name folders that hold a config.yaml")
    table = comparison(runs)
    Console().print(table.rich(title="Test accuracy"))
    if config.out is not None:
        write_page(config.out, runs, title="Comparison of runs", findings=claims(table), commands=[command])
        print(Path(config.out).resolve())


def _progress(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
