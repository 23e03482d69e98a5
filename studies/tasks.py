"""Normalizers where one image fills a device: segmentation, video, detection, instance segmentation, like for like.

    python -m studies.tasks [--only camvid clips bccd coco128] [--data.root ~/.cache/batchless-data] [--processes 2]

Each task has one small network, trained from random weights with `gn`, `gn+ws`, `bcn-micro+ws` and `frozen-bn`
(whose statistics stay 0 and 1) at one image per forward and `bn` at two, at an equal budget of images, as many images per
step and the same learning rate: the recipe's, searched for none of them here (docs/results.md says where the recipes' come
from). What is trained is in `studies/task_cells.py`.

One process of one thread for each cell. A cell that has ended is not run again, one that was interrupted goes on from its last
checkpoint, or anew if its settings have changed since; when a cell has ended its checkpoints are deleted and its figures
written to `docs/studies/tasks.json`. A loss that is not finite is a result. `python -m studies.report` makes the tables from
that. An estimate of the time comes first.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from batchless.arguments import parse_arguments
from batchless.runs import read_run
from batchless.tasks.config import TrainConfig
from studies.running import ended, has_failed, keep_run, kept, run_cell, words_of
from studies.task_cells import PROBLEMS, Cell, cells

RESULTS = Path("docs/studies/tasks.json")


def main(words: list[str] | None = None) -> int:
    """Run what is not done yet; 1 if a cell could not be run, 2 if the data is not there."""
    options = _parse(words)
    todo = [cell for cell in cells(tuple(options.only)) if cell.name not in kept(RESULTS)]
    print(estimate(todo, kept(RESULTS), processes=options.processes), flush=True)
    if options.estimate:
        return 0
    for folder in sorted({folder for cell in todo if (folder := _data(cell, options)) is not None}):
        if not folder.is_dir():
            print(f"{folder} is not there: give the folder that holds it by --data.root", file=sys.stderr)
            return 2
    with ThreadPoolExecutor(options.processes) as pool:
        done = list(pool.map(lambda cell: _run(cell, options), todo))
    return 0 if all(done) else 1


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.tasks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="these tasks")
    cache = Path("~/.cache/batchless-data").expanduser()
    parser.add_argument("--data.root", dest="root", type=Path, default=cache, help="holds camvid, bccd and coco128")
    parser.add_argument("--out", type=Path, default=Path("runs/tasks-study"), help="the run folders")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time (2)")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and run nothing")
    return parser.parse_args(words)


def estimate(todo: list[Cell], records: Mapping[str, Any], *, processes: int) -> str:
    """How long the cells take, by the seconds of those that have ended, else by what `PROBLEMS` guesses."""
    seconds = sum(_seconds(cell, records) for cell in todo) / processes
    return f"{len(todo)} cells to do, about {seconds / 3600:.1f} hours with {processes} at a time"


def _seconds(cell: Cell, records: Mapping[str, Any]) -> float:
    """The median over the kept cells of the same task that did not fail; of an interrupted one only training is known."""
    alike = [
        record.get("command_seconds", record["summary"]["seconds"])
        for record in records.values()
        if record["problem"] == cell.problem and "failed" not in record["summary"]
    ]
    return median(alike) if alike else PROBLEMS[cell.problem].seconds


def command(cell: Cell, options: argparse.Namespace) -> list[str]:
    """`batchless train` with the cell's settings, or going on with it where it has a checkpoint."""
    folder = options.out / cell.name
    start = [sys.executable, "-m", "batchless.cli"]
    if (folder / "checkpoints" / "last.pt").exists():
        return [*start, "train", "--resume", str(folder)]
    return [*start, *_words(cell, options)]


def _words(cell: Cell, options: argparse.Namespace) -> list[str]:
    settings = cell.settings() | {"out": options.out / cell.name}
    if (data := _data(cell, options)) is not None:
        settings["data.root"] = data
    return ["train", *words_of(settings)]


def _has_changed(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether the cell's folder holds a run of other settings than the cell has now; where data and runs lie is none."""
    folder = options.out / cell.name
    if not (folder / "config.yaml").exists():
        return False
    try:
        before = TrainConfig.from_plain(read_run(folder).config, source=folder)
    except ValueError:  # of settings that are no more
        return True
    return _plain(before) != _plain(parse_arguments(_words(cell, options)))


def _plain(config: Any) -> dict[str, Any]:
    plain: dict[str, Any] = config.plain()
    return plain | {"out": None, "data": plain["data"] | {"root": None}}


def _data(cell: Cell, options: argparse.Namespace) -> Path | None:
    folder = PROBLEMS[cell.problem].folder
    root: Path = options.root
    return None if folder is None else root / folder


def _run(cell: Cell, options: argparse.Namespace) -> bool:
    folder = options.out / cell.name
    about: dict[str, Any] = asdict(cell)
    if _has_changed(cell, options):
        print(f"{cell.name}: its settings have changed, it starts anew", flush=True)
        shutil.rmtree(folder)
    if not ended(folder):
        words = command(cell, options)
        if "--resume" not in words:
            shutil.rmtree(folder, ignore_errors=True)
        begin = time.perf_counter()
        error = run_cell(cell.name, words)
        if "--resume" not in words:
            about["command_seconds"] = time.perf_counter() - begin
        if error and not has_failed(folder):
            print(f"{cell.name}: {error}", flush=True)
            return False
    keep_run(RESULTS, cell.name, folder, about)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
