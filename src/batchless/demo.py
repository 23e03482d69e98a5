"""The whole idea in minutes: one small network, several normalizers, one to many images per forward."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from batchless.models.detectors import DetectorSettings
from batchless.report import Comparison, claims, comparison, write_page
from batchless.report.main_figure import main_figure
from batchless.runs import Run, read_run
from batchless.tasks import DataSettings, TrainConfig, run_training
from batchless.train.settings import OptimizerSettings

OnRun = Callable[[str, int, int], None]
"""`on_run(what, done, total)`: called when a run has ended."""

_SET_BY_THE_DEMO = {
    "normalizer": "normalizers",
    "images_per_forward": "images_per_forward",
    "seed": "seeds",
    "out": "out",
    "threads": "processes",
}
"""Settings of a run that are not `train`'s here, and where they come from."""

DETECTION = TrainConfig(
    task="detect",
    model="fcos_resnet18_fpn",
    images=2400,
    images_per_step=8,
    evaluations=3,
    data=DataSettings(test_images=100),
    detector=DetectorSettings(shorter_side=96, longest_side=96, stages=2, channels=32),
    optimizer=OptimizerSettings(name="adamw", learning_rate=0.002, weight_decay=1e-4, clip_norm=10.0),
)
"""What `batchless demo --task detect` trains, but for what is set otherwise."""

VIDEO = TrainConfig(
    task="video", model="tsm:cifar_resnet8", images=3200, data=DataSettings(image_size=16, crop_padding=0)
)
"""What `batchless demo --task video` trains, but for what is set otherwise: TSM on the embedded clips."""

SEGMENTATION = TrainConfig(
    task="segment",
    model="cifar_resnet8_lraspp",
    images=2400,
    images_per_step=8,
    evaluations=2,
    data=DataSettings(test_images=100),
    optimizer=OptimizerSettings(learning_rate=0.3, clip_norm=10.0),
)
"""What `batchless demo --task segment` trains, but for what is set otherwise."""

_SIZES: Mapping[str, tuple[int, ...]] = {"detect": (1, 2), "segment": (1, 2, 8)}
"""Images per forward of tasks whose steps are of fewer images."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `batchless demo` compares.

    Attributes:
        out: folder of the runs and of `report.html`; must not exist.
        normalizers: the rows.
        images_per_forward: the columns; if nothing else is said, for detection 1 and 2, for segmentation 1, 2 and 8.
        seeds: how often each run is repeated, with seeds 0, 1, ...
        train: what all runs have in common. With `train.task` (also `--task`) detect, segment or video, settings left at their
            defaults are the demo's of that task.
        processes: runs at a time, each with one thread; None: one per core.
    """

    out: str = "runs/demo"
    normalizers: tuple[str, ...] = ("bn", "gn", "gn+ws", "bcn-micro+ws")
    images_per_forward: tuple[int, ...] = (1, 2, 32)
    seeds: int = 1
    train: TrainConfig = field(default_factory=TrainConfig)
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("normalizers", "images_per_forward"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, got {list(values)}")
        for name, value in (("seeds", self.seeds), ("processes", self.processes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        sizes = DemoConfig.images_per_forward
        if self.images_per_forward == sizes:
            object.__setattr__(self, "images_per_forward", _SIZES.get(self.train.task, sizes))
        if (other := {"detect": DETECTION, "segment": SEGMENTATION, "video": VIDEO}.get(self.train.task)) is not None:
            object.__setattr__(self, "train", _filled(self.train, TrainConfig(), other))
        for name, source in _SET_BY_THE_DEMO.items():
            if getattr(self.train, name) != getattr(TrainConfig(), name):
                raise ValueError(f"train.{name} is not one for all runs here: set {source} instead")
        self.runs()

    def runs(self) -> list[TrainConfig]:
        """One configuration for each run, those that take longest first."""
        folder = Path(self.out)
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


def _filled(given: Any, defaults: Any, other: Any) -> Any:
    """`given` with each setting that is at its default replaced by that of `other`, groups of settings one by one."""
    values = {}
    for item in fields(given):
        value, default, instead = (getattr(settings, item.name) for settings in (given, defaults, other))
        if is_dataclass(value):
            values[item.name] = _filled(value, default, instead)
        else:
            values[item.name] = instead if value == default else value
    return type(given)(**values)


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
    folder = Path(config.out)
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder with --out, or remove it")
    runs = config.runs()
    done: dict[str, Run] = {}
    with _training(runs, processes=config.processes or os.cpu_count() or 1) as waiting:
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


@contextmanager
def _training(runs: Sequence[TrainConfig], *, processes: int) -> Iterator[dict[Future[str], TrainConfig]]:
    """The runs, being trained in processes of their own; an exception in the block ends these at once."""
    others = multiprocessing.active_children()
    # spawn: torch's threads do not survive a fork.
    with ProcessPoolExecutor(min(processes, len(runs)), multiprocessing.get_context("spawn"), _end_silently) as pool:
        try:
            yield {pool.submit(_train, run): run for run in runs}
        except BaseException as error:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ValueError(
                    "a run's process was ended from outside, probably for want of memory: give fewer --processes"
                ) from error
            raise


def _end_silently() -> None:
    """Let Ctrl-C, which the terminal sends to every process, end this one without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _train(config: TrainConfig) -> str:
    try:
        finished = run_training(config)
        return f"{100 * finished.summary[f'test_{main_figure(read_run(finished.folder)).name}']:.1f} %"
    except Exception as error:
        if not (Path(str(config.out)) / "summary.json").exists():
            raise  # a wrong setting, not a run that failed
        return f"failed ({error})"
