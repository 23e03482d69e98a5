"""The command `batchless`: trains, compares and shows."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from batchless.demo import DemoConfig, run_demo
from batchless.report import claims, comparison, write_page
from batchless.runs import Run, find_runs, read_run
from batchless.tasks import TrainConfig, run_training

_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 2 for a mistake of the user's, told in one line."""
    from jsonargparse import ArgumentParser

    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(prog="batchless", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("demo", _demo_parser(), help="the whole idea in minutes, ends in a report page")
    commands.add_subcommand("train", _train_parser(), help="train one network, writes a run folder")
    commands.add_subcommand("compare", _compare_parser(), help="a table and a page from run folders")
    try:
        given = parser.instantiate(parser.parse_args([_recipe_path(words, index) for index in range(len(words))]))
        run: Callable[[Any, list[str]], None] = {"demo": _demo, "train": _train, "compare": _compare}[given.command]
        run(given[given.command], words)
    except KeyboardInterrupt:
        print("\nbatchless: stopped", file=sys.stderr)
        return 130
    except (ValueError, _argument_error()) as error:
        print(f"batchless: {' '.join(str(error).split())}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def _argument_error() -> type[Exception]:
    from argparse import ArgumentError

    return ArgumentError


def _train_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description="Train one network; everything goes to a run folder.")
    parser.add_argument("--config", action="config", help="a packaged recipe's name, or a YAML file")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def _demo_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description="Compare normalizers at one to many images per forward.")
    parser.add_class_arguments(DemoConfig, as_group=False)
    return parser


def _compare_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description="Compare runs: a table, and a page if --out is given.")
    parser.add_argument("folders", nargs="+", type=str, help="run folders, or folders that hold them")
    parser.add_argument("--out", type=str, default=None, help="the HTML page to write")
    return parser


def _recipe_path(words: Sequence[str], index: int) -> str:
    """The word, or the path of the packaged recipe if it names one after `--config`."""
    word = words[index]
    name = word.removeprefix("--config=")
    if not (word.startswith("--config=") or (index and words[index - 1] == "--config")) or Path(name).exists():
        return word
    recipes = resources.files("batchless") / "recipes"
    known = sorted(recipe.name.removesuffix(".yaml") for recipe in recipes.iterdir() if recipe.name.endswith(".yaml"))
    if name not in known:
        raise ValueError(f"there is no file {name!r} and no recipe of that name: the recipes are {', '.join(known)}")
    return word.removesuffix(name) + str(recipes / f"{name}.yaml")


def _train(given: Any, words: list[str]) -> None:
    from rich.console import Console

    config = _build(given, TrainConfig)
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


def _demo(given: Any, words: list[str]) -> None:
    from rich.console import Console

    config = _build(given, DemoConfig)
    console = Console()
    started = time.perf_counter()
    total = len(config.normalizers) * len(config.images_per_forward) * config.seeds
    console.print(f"{total} runs of {config.train.images} images each, {config.train.model}", markup=False)
    with _progress(console) as progress:
        bar = progress.add_task("runs", total=total, figures="the first ones take longest")
        page, table, findings = run_demo(
            config,
            lambda what, done, _: progress.update(bar, completed=done, figures=what),
            commands=[f"batchless {shlex.join(words)}"],
        )
    console.print(table.rich(title="Test accuracy"))
    for finding in findings:
        console.print(f"- {finding}", markup=False, highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s; report: {page.resolve()}", markup=False, highlight=False)


def _compare(given: Any, words: list[str]) -> None:
    from rich.console import Console

    runs: list[Run] = [run for folder in given.folders for run in find_runs(folder)]
    if not runs:
        raise ValueError(f"no run folder in {', '.join(given.folders)}: name folders that hold a config.yaml")
    table = comparison(runs)
    Console().print(table.rich(title="Test accuracy"))
    if given.out is not None:
        command = f"batchless {shlex.join(words)}"
        write_page(given.out, runs, title="Comparison of runs", findings=claims(table), commands=[command])
        print(Path(given.out).resolve())


def _build(given: Any, kind: type[Any]) -> Any:
    """The frozen dataclass `kind` from what was parsed."""
    return kind(**{item.name: given[item.name] for item in fields(kind)})


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
