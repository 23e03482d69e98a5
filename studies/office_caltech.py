"""FedWon's tables on Office-Caltech-10, and label skew on CIFAR-10, with baselines that are no straw men.

    python -m studies.office_caltech --stage c [--data.root ~/office_caltech_10] [--cifar.root ~/cifar10] [--processes 2]

    c  reduced (96 px, 60 rounds): no normalization with and without weight standardization (both also without clipping)
    b  reduced: all methods, three seeds, the learning rate chosen by validation for every one, each with and without clipping
    a  full resolution (256 px), one seed, 100 rounds: FedAvg, FedBN, FedWon at batch 32 and at batch 2
    d  reduced: FedWon's gamma
    e  CIFAR-10 with label skew, a small network

The protocol is FedBN's (docs/definitions.md): 62 training and 50 validation images a client, AlexNet, SGD without momentum,
images in [0, 1], flips. Not theirs: no rotation; validation images are not augmented. Images are decoded and resized once, into
archives beside the runs.

One process of one thread for each cell. A cell that has ended, or diverged, is not run again, one that was interrupted goes on
from its last checkpoint; when a cell has ended its checkpoints (456 MB) are deleted and its figures written to
`docs/studies/office_caltech.json`. `python -m studies.report` makes the tables from that. An estimate of the time comes first.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional

from batchless.data import ImageDataset, open_images
from batchless.data.domain_folders import find_domain_folders, open_domain_folder
from batchless.data.folders import existing_folder
from studies.office_cells import SECONDS, Cell, cells
from studies.running import KEEPING_MEMORY, ended, has_failed, keep_run, kept, run_cell, words_of

RESULTS = Path("docs/studies/office_caltech.json")


def main(words: list[str] | None = None) -> int:
    """Run what is not done yet; 1 if a cell failed, 2 if the data is not there."""
    options = _parse(words)
    failed: set[str] = set()
    while todo := [cell for cell in _open_cells(options.stage) if cell.name not in failed]:
        print(estimate(todo, kept(RESULTS), processes=options.processes), flush=True)
        if options.estimate:
            return 0
        try:
            for cell in todo:
                archive(cell, options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        with ThreadPoolExecutor(options.processes) as pool:
            done = list(pool.map(lambda cell: _run(cell, options), todo))
        failed |= {cell.name for cell, fine in zip(todo, done, strict=True) if not fine}
    return 1 if failed else 0


def _parse(words: list[str] | None) -> argparse.Namespace:
    cache = Path("~/.cache/batchless-data").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m studies.office_caltech", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--stage", required=True, choices=list("abcde"), help="c is the cheapest that decides something"
    )
    parser.add_argument(
        "--data.root", dest="office", type=Path, default=cache / "office_caltech_10", help="four domains"
    )
    parser.add_argument("--cifar.root", dest="cifar10", type=Path, default=cache / "cifar10", help="for stage e")
    parser.add_argument("--out", type=Path, default=Path("runs/office-caltech-study"), help="run folders and archives")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time (2)")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and run nothing")
    return parser.parse_args(words)


def _open_cells(stage: str) -> list[Cell]:
    """Those of the stage that are not kept; what is kept may make new ones known."""
    records = kept(RESULTS)
    return [cell for cell in cells(stage, records) if cell.name not in records]


def estimate(todo: list[Cell], records: Mapping[str, Any], *, processes: int) -> str:
    """How long the cells take, by the seconds of those that have ended, else by `SECONDS`."""
    seconds = sum(cell.rounds * seconds_of_round(cell, records) for cell in todo) / processes
    return f"{len(todo)} cells to do, about {seconds / 3600:.1f} hours with {processes} at a time (later seeds come on top)"


def seconds_of_round(cell: Cell, records: Mapping[str, Any]) -> float:
    """The median over the kept cells with the same data, pixels and step, with one thread."""
    alike = [
        record["summary"]["seconds"] / record["summary"]["rounds"]
        for record in records.values()
        if all(record[key] == getattr(cell, key) for key in ("data", "image_size", "images_per_step"))
        and "failed" not in record["summary"]
    ]
    return median(alike) if alike else SECONDS[cell.data, cell.image_size, cell.images_per_step]


def archive(cell: Cell, options: argparse.Namespace) -> Path:
    """The folder with the cell's domains as archives of resized images, made if it is not there.

    ValueError if the data is not where the options say.
    """
    folder: Path = options.out / "archives" / f"{cell.data}-{cell.image_size}"
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    root = existing_folder(getattr(options, cell.data), holding=["the images of the study"])
    if cell.data == "cifar10":
        parts: dict[str, NDArray[Any]] = {}
        for split in ("train", "test"):
            images = open_images(root, split)
            parts |= {f"{split}_images": resized(images, cell.image_size), f"{split}_labels": labels_of(images)}
        _save(folder / "cifar10.npz", **parts, classes=np.array(images.classes))
    else:
        for domain in find_domain_folders(root):
            images = open_domain_folder(root / domain, "train").images
            found = {"images": resized(images, cell.image_size), "labels": labels_of(images)}
            _save(folder / f"{domain}.npz", **found, classes=np.array(images.classes))
    (folder / "complete").touch()
    return folder


def resized(images: ImageDataset, size: int) -> NDArray[np.uint8]:
    """All images as `[N, S, S, 3]`, whatever their proportions, as FedBN's code resizes them."""
    found = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for index in range(len(images)):
        image = images.image(index)
        if image.shape[-2:] != (size, size):
            image = functional.resize(image, [size, size], antialias=True)
        found[index] = image.permute(1, 2, 0).numpy()
    return found


def labels_of(images: ImageDataset) -> NDArray[np.int64]:
    """`[N]`."""
    return np.array([images.label(index) for index in range(len(images))], dtype=np.int64)


def _save(path: Path, **arrays: NDArray[Any]) -> None:
    part = path.with_name(f".{path.name}")
    np.savez(part, **arrays)
    part.replace(path)


def command(cell: Cell, *, root: Path, folder: Path) -> list[str]:
    """`batchless federate` with the cell's settings, or going on with it where it has a checkpoint."""
    start = [sys.executable, "-m", "batchless.cli", "federate"]
    if (folder / "checkpoints" / "last.pt").exists():
        return [*start, "--resume", str(folder), "--data.root", str(root)]
    settings = cell.settings() | {"data.root": root, "out": folder}
    return [*start, *words_of(settings)]


def _run(cell: Cell, options: argparse.Namespace) -> bool:
    folder = options.out / cell.name
    if not ended(folder):
        words = command(cell, root=archive(cell, options), folder=folder)
        if "--resume" not in words:
            shutil.rmtree(folder, ignore_errors=True)
        error = run_cell(cell.name, words, KEEPING_MEMORY)
        if error and not has_failed(folder):
            print(f"{cell.name}: {error}", flush=True)
            return False
    keep_run(RESULTS, cell.name, folder, asdict(cell))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
