"""The CIFAR-10 study: normalizers at few images per forward, and which law the rate of BCN's estimates follows.

    python -m studies.cifar10 --data.root FOLDER --out runs/cifar10-study [--processes 2] [--stage A]

ResNet-20 on 10,000 training images (chosen by the seed), all 10,000 test images, an optimizer step every 64 images, the same
image budget for every cell. The micro-batches of a step run in one forward (`studies.together`): the same arithmetic in a
fifth of the time. For the same reason a network whose statistics do not depend on the micro-batch is trained once and stands
for 1, 2, 8 and 64 images per forward: group normalization, frozen statistics, estimates that move at the step's end.

One process of one thread for each cell; a cell that has ended is not run again, one that was interrupted starts anew. After
each cell `docs/studies/cifar10.json` gets its figures: configuration, learning curve, summary and machine, no weights.
`python -m studies.report` makes the tables of docs/results.md from it.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from studies.running import ended, keep_run, kept, run_cell, words_of

RESULTS = Path("docs/studies/cifar10.json")
EPOCH = 10_000

MEMORIES = (20, 200, 2000)
"""Images after which an image's weight in the estimates has fallen to 1/e: rates of 0.1, 0.01, 0.001 for 2 images."""


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    stage: str
    normalizer: str
    images_per_forward: int
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        """The run folder's name."""
        return f"{self.normalizer}-{self.images_per_forward}-{self.epochs}epochs-seed{self.seed}"

    def command(self, *, root: str, folder: Path) -> list[str]:
        """`batchless train` with this cell's settings, its micro-batches together."""
        settings = {
            "config": "cifar10_resnet20",
            "data.root": root,
            "data.train_images": EPOCH,
            "normalizer": self.normalizer,
            "images_per_forward": self.images_per_forward,
            "images_per_step": 64,
            "images": self.epochs * EPOCH,
            "evaluations": self.epochs // 3,
            "seed": self.seed,
            "threads": 1,
            "out": str(folder),
        }
        return [sys.executable, "-m", "studies.cell", "train", *words_of(settings)]


def cells() -> Iterator[Cell]:
    """All cells, in the order of their worth: every question once before any is asked again."""
    for seed in (0, 1):
        for normalizer, sizes in _stage_a():
            for size in sizes:
                yield Cell("A", normalizer, size, seed, epochs=12)
    for seed in (0, 1):
        for normalizer, sizes in _stage_b():
            for size in sizes:
                yield Cell("B", normalizer, size, seed, epochs=12)


def _stage_a() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "bn", (64, 2)
    yield "gn+ws", (8,)
    for memory in MEMORIES:
        yield f"bcn-micro(memory={memory}, update=step)+ws", (2,)
    for memory in MEMORIES:
        yield f"bcn-micro(memory={memory}, update=forward)+ws", (2, 1)


def _stage_b() -> Iterator[tuple[str, tuple[int, ...]]]:
    for normalizer in ("bcn-micro", "frozen-bn", "gn", "in+ws"):
        yield normalizer, (8,)
    yield "bn", (1, 8)
    yield "bcn+ws", (64,)


def main() -> int:
    """Run what is not done yet; 1 if a cell failed."""
    options = _parse()
    wanted = [cell for cell in cells() if cell.stage in options.stage]
    todo = [cell for cell in wanted if cell.name not in kept(RESULTS)]
    print(f"{len(wanted)} cells, {len(wanted) - len(todo)} done", flush=True)
    with ThreadPoolExecutor(options.processes) as pool:
        done = list(pool.map(lambda cell: _run(cell, options), todo))
    return 0 if all(done) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.cifar10", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data.root", dest="root", required=True, help="folder with cifar-10-batches-py")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10-study"), help="the run folders")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time (2)")
    parser.add_argument("--stage", default="A", choices=["A", "B", "AB"])
    return parser.parse_args()


def _run(cell: Cell, options: argparse.Namespace) -> bool:
    folder = options.out / cell.name
    if ended(folder):
        keep_run(RESULTS, cell.name, folder, asdict(cell))
        return True
    shutil.rmtree(folder, ignore_errors=True)
    if error := run_cell(cell.name, cell.command(root=options.root, folder=folder)):
        print(f"{cell.name}: {error}", flush=True)
        return False
    keep_run(RESULTS, cell.name, folder, asdict(cell))
    return True


if __name__ == "__main__":
    sys.exit(main())
