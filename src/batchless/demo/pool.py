"""Runs of both kinds, trained in processes of their own, each with one thread."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from batchless.federated import FederateConfig, run_federation
from batchless.report.main_figure import main_figure
from batchless.runs import read_run
from batchless.tasks import TrainConfig, run_training

AnyConfig = TrainConfig | FederateConfig

OnProgress = Callable[[str, float, int], None]
"""`on_progress(what, done, total)`: what the run that ended last came to, how many runs are done, shares of them included."""

_SECONDS = 0.5
"""From one look at the runs to the next."""


def train_all(runs: Sequence[AnyConfig], on_progress: OnProgress, *, processes: int) -> None:
    """Train every run, so many at a time, in the given order; one that fails is done too, and its folder says why.

    Args:
        runs: each with a folder of its own.
        on_progress: called when a run ends, and in between; how far a run is, its folder tells.
        processes: at a time.

    Raises:
        ValueError: a wrong setting, or a process that was ended from outside; the others are ended too.
    """
    what, done = "", 0
    with _training(runs, processes=processes) as running:
        waiting = set(running)
        while waiting:
            ended, waiting = wait(waiting, timeout=_SECONDS, return_when=FIRST_COMPLETED)
            for future in ended:
                what, done = f"{_title(running[future])}: {future.result()}", done + 1
            on_progress(what, done + sum(_share(running[future]) for future in waiting), len(runs))


@contextmanager
def _training(runs: Sequence[AnyConfig], *, processes: int) -> Iterator[dict[Future[str], AnyConfig]]:
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


def _train(config: AnyConfig) -> str:
    """What came out, in words."""
    try:
        finished = run_federation(config) if isinstance(config, FederateConfig) else run_training(config)
        return f"{100 * finished.summary[f'test_{main_figure(read_run(finished.folder)).name}']:.1f} %"
    except Exception as error:
        if not (config.folder() / "summary.json").exists():
            raise  # a wrong setting, not a run that failed
        return f"failed ({error})"


def _title(run: AnyConfig) -> str:
    return run.algorithm if isinstance(run, FederateConfig) else f"{run.normalizer} at {run.images_per_forward}"


def _share(run: AnyConfig) -> float:
    """How much of the run is done, from 0 to 1."""
    try:
        lines = read_run(run.folder()).metrics
    except ValueError:  # not begun
        return 0.0
    key, whole = ("round", run.rounds) if isinstance(run, FederateConfig) else ("images", run.images)
    return max((min(float(line[key]) / whole, 1.0) for line in lines if key in line), default=0.0)
