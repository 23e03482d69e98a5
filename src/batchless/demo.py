"""The whole idea in minutes: one small network, several normalizers, one to many images per forward."""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from batchless.report import Comparison, claims, comparison, write_page
from batchless.runs import Run, read_run
from batchless.tasks import TrainConfig, run_training

OnRun = Callable[[str, int, int], None]
"""`on_run(what, done, total)`: called when a run has ended."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `batchless demo` compares.

    Attributes:
        out: folder of the runs and of `report.html`; must not exist. None: runs/demo, runs/demo-2, ...
        normalizers: the rows.
        images_per_forward: the columns.
        seeds: how often each run is repeated, with seeds 0, 1, ...
        train: what all runs have in common.
        processes: runs at a time, each with one thread; None: one per core.
    """

    out: str | None = None
    normalizers: tuple[str, ...] = ("bn", "gn", "gn+ws", "bcn-micro+ws")
    images_per_forward: tuple[int, ...] = (1, 2, 32)
    seeds: int = 1
    train: TrainConfig = field(default_factory=TrainConfig)
    processes: int | None = None

    def folder(self) -> Path:
        """Where everything goes."""
        if self.out is not None:
            return Path(self.out)
        names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
        return next(folder for name in names if not (folder := Path("runs") / name).exists())

    def runs(self, folder: Path) -> list[TrainConfig]:
        """One configuration for each run in `folder`, those that take longest first."""
        return [
            replace(
                self.train,
                normalizer=normalizer,
                images_per_forward=size,
                seed=seed,
                threads=1,
                out=str(folder / f"{normalizer}-{size}-seed{seed}"),
            )
            for size in sorted(self.images_per_forward)
            for seed in range(self.seeds)
            for normalizer in self.normalizers
        ]


def run_demo(config: DemoConfig, on_run: OnRun, *, commands: Sequence[str]) -> tuple[Path, Comparison, list[str]]:
    """Train every combination and write `report.html`.

    Args:
        config: what is compared.
        on_run: shows the progress.
        commands: how it was started, for the report.

    Returns:
        The page, the comparison and its findings.

    Raises:
        ValueError: the folder exists, or a wrong setting. A combination that cannot train (batch statistics of one
            value) is a result, not an error.
    """
    folder = config.folder()
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder with --out, or remove it")
    runs = config.runs(folder)
    done: dict[str, Run] = {}
    workers = config.processes or os.cpu_count() or 1
    # spawn: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_train, run): run for run in runs}
        for future in as_completed(waiting):
            run = waiting[future]
            outcome = future.result()
            done[str(run.out)] = read_run(str(run.out))
            on_run(f"{run.normalizer} at {run.images_per_forward}: {outcome}", len(done), len(runs))
    ordered = [done[str(run.out)] for normalizer in config.normalizers for run in runs if run.normalizer == normalizer]
    table = comparison(ordered)
    findings = claims(table)
    page = folder / "report.html"
    write_page(page, ordered, title="Batch statistics at one image per forward", findings=findings, commands=commands)
    return page, table, findings


def _train(config: TrainConfig) -> str:
    try:
        return f"{100 * run_training(config).summary['test_accuracy']:.1f} %"
    except ValueError as error:
        if not (Path(str(config.out)) / "summary.json").exists():
            raise  # a wrong setting, not a run that failed
        return f"failed ({error})"
