"""A federated run from its configuration to a run folder, and on from where it was interrupted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from batchless.federated.config import FederateConfig
from batchless.federated.engine import Engine, LocalEngine, torch_threads
from batchless.federated.preparation import Prepared, new_folder, prepare
from batchless.federated.ranks import Ended, RankEngine, UnresponsiveError
from batchless.federated.rounds import OnRound, Rounds, show_nothing
from batchless.federated.server import ServerState
from batchless.federated.state import Progress, restore
from batchless.federated.workers import WorkerEngine
from batchless.runs import RunFolder, load_checkpoint
from batchless.runs.memory import forget_peak_memory
from batchless.surgery import ConversionReport
from batchless.train import Processes, TrainingStoppedError, processes_of_torchrun
from batchless.train.interrupt import ShouldStop, never_stop
from batchless.train.run_ends import begun, failure_told, on_first


@dataclass(frozen=True, kw_only=True)
class FinishedFederation:
    """The result of a federated run.

    Attributes:
        folder: where everything is.
        summary: the final figures.
        conversion: what the normalizer's name did to the network.
        explanation: which tensors were shared, and which stayed with the clients.
        notes: what of the pretrained weights was taken.
    """

    folder: Path
    summary: Mapping[str, Any]
    conversion: ConversionReport
    explanation: str
    notes: tuple[str, ...]


MakeEngine = Callable[[Prepared], Engine]
"""Makes an engine of what a run begins with."""


def explain_federation(config: FederateConfig) -> str:
    """What would be shared and what would stay with the clients, on this network; nothing is trained or written.

    ValueError as for `run_federation`.
    """
    return prepare(config, device=config.device).explanation()


def say_nothing(explanation: str) -> None:
    """Print nothing."""


def run_federation(
    config: FederateConfig,
    on_round: OnRound = show_nothing,
    *,
    should_stop: ShouldStop = never_stop,
    on_start: Callable[[str], None] = say_nothing,
    elsewhere: MakeEngine | None = None,
) -> FinishedFederation:
    """Train as `config` says; the run folder gets `failed` as its summary if that is not possible.

    In this process, in as many as `config.workers` says, or under torchrun in all of its, of which the first one writes: the
    result has the same bits.

    Args:
        config: all of it.
        on_round: shows the progress; in the first process only.
        should_stop: asked after every client, under torchrun after every round.
        on_start: called before the first round with what is shared and what stays with the clients.
        elsewhere: makes the engine, for clients that are not this machine's (`batchless.federated.flower`).

    Raises:
        ValueError: a wrong setting (nothing is written), or a failure in a round (the folder says so).
        TrainingStoppedError: `should_stop()` became true; `resume_federation` goes on.
    """
    _require_engine(config, elsewhere)
    if config.leave_one_domain_out:
        raise ValueError("leave_one_domain_out is several runs: use batchless.federated.leave_one_domain_out")
    with _processes(config) as (processes, device):
        prepared = prepare(config, device=device)
        run = on_first(processes, lambda: new_folder(prepared))
        if processes.first:
            on_start(prepared.explanation())
        return _go(prepared, prepared.state, {}, Progress(), run, processes, on_round, should_stop, elsewhere)


def resume_federation(
    folder: str | Path,
    on_round: OnRound = show_nothing,
    *,
    should_stop: ShouldStop = never_stop,
    device: str | None = None,
    root: str | None = None,
    workers: int | None = None,
    elsewhere: MakeEngine | None = None,
) -> FinishedFederation:
    """Go on with the run in `folder` from its last checkpoint, to the same bits as if it had never been interrupted.

    Args:
        folder: of a run that was interrupted or has failed.
        on_round: shows the progress.
        should_stop: as for `run_federation`.
        device: another device than before; None: the same.
        root: where the data lies now; None: where it lay.
        workers: another number of processes; None: as before.
        elsewhere: as for `run_federation`.

    Raises:
        ValueError: no run, one that has ended, one in use by another process, a damaged or foreign checkpoint.
        TrainingStoppedError: as for `run_federation`.
    """
    config = begun(folder, FederateConfig, device=device, root=root)
    config = replace(config, workers=workers or config.workers)
    _require_engine(config, elsewhere)
    last = config.folder() / "checkpoints" / "last.pt"
    with _processes(config) as (processes, own_device):
        prepared = prepare(config, device=own_device)
        state, locals, progress = _restored(prepared, last)

        def go_on() -> RunFolder:
            run = RunFolder.resume(config.folder(), images=progress.images, tensorboard=config.tensorboard)
            try:
                run.forget_metrics_after(progress.metrics_bytes)
            except BaseException:
                run.release()
                raise
            return run

        run = on_first(processes, go_on)
        return _go(prepared, state, locals, progress, run, processes, on_round, should_stop, elsewhere)


def _restored(prepared: Prepared, last: Path) -> tuple[ServerState, dict[int, dict[str, Tensor]], Progress]:
    if not last.exists():  # interrupted before its first checkpoint
        return prepared.state, {}, Progress()
    checkpoint = load_checkpoint(last)
    try:
        return restore(checkpoint, prepared.state)
    except ValueError as error:
        raise ValueError(f"{last}: {error}") from error


def _go(
    prepared: Prepared,
    state: ServerState,
    locals: dict[int, dict[str, Tensor]],
    progress: Progress,
    run: RunFolder | None,
    processes: Processes,
    on_round: OnRound,
    should_stop: ShouldStop,
    elsewhere: MakeEngine | None,
) -> FinishedFederation:
    config = prepared.config
    forget_peak_memory(prepared.workplace.settings.device)
    if run is None:
        summary = _outcome(RankEngine(prepared.workplace, state, processes).follow())
    else:
        with run, failure_told(run), _engine(prepared, state, processes, elsewhere) as engine:
            summary = Rounds(
                engine=engine,
                workplace=prepared.workplace,
                config=config,
                state=state,
                locals=dict(locals),
                progress=progress,
                run=run,
                about=_about(prepared),
                on_round=on_round,
                should_stop=should_stop,
                stops_within_rounds=processes.count == 1,
            ).run_all()
            run.finish(summary)
            if isinstance(engine, RankEngine):
                engine.end(Ended(outcome=summary))
    return FinishedFederation(
        folder=config.folder(),
        summary=summary,
        conversion=prepared.conversion,
        explanation=prepared.explanation(),
        notes=prepared.notes,
    )


def _about(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint says of itself: as those of `batchless train`, and who the clients are."""
    statistics = prepared.workplace.settings.statistics
    return {
        "config": prepared.config.network_config().plain(),
        "federation": prepared.config.plain(),
        "classes": list(prepared.workplace.federation.classes),
        "mean": list(statistics.mean),
        "std": list(statistics.std),
        "clients": [{"id": client.id, "domain": client.domain} for client in prepared.workplace.clients()],
    }


@contextmanager
def _engine(
    prepared: Prepared, state: ServerState, processes: Processes, elsewhere: MakeEngine | None
) -> Iterator[Engine]:
    """Where the clients of the run are trained."""
    config, workplace = prepared.config, prepared.workplace
    if elsewhere is not None:
        yield elsewhere(prepared)
        return
    workers = config.worker_count(prepared.clients_per_round())
    if processes.count > 1:
        ranks = RankEngine(workplace, state, processes, timeout=config.client_timeout)
        try:
            yield ranks
        except UnresponsiveError:
            raise  # nobody can be told: torchrun ends the others with this process
        except TrainingStoppedError as stopped:
            ranks.end(Ended(stopped=stopped.images))
            raise
        except ValueError as error:
            ranks.end(Ended(error=str(error)))
            raise
    elif workers > 1 or config.client_timeout is not None:  # this process itself could not be replaced
        with WorkerEngine(
            workplace, state, count=workers, threads=config.threads, timeout=config.client_timeout
        ) as spawned:
            yield spawned
    else:
        yield LocalEngine(workplace=workplace)


def _require_engine(config: FederateConfig, elsewhere: MakeEngine | None) -> None:
    if config.engine == "flower" and elsewhere is None:
        raise ValueError(
            "engine=flower: use batchless.federated.loopback, which starts Flower on this machine, or submit the app by "
            "`flwr run` (docs/flower.md)"
        )


def _outcome(ended: Ended) -> dict[str, Any]:
    if ended.stopped is not None:
        raise TrainingStoppedError(ended.stopped)
    if ended.error is not None:
        raise ValueError(ended.error)
    summary: dict[str, Any] = ended.outcome
    return summary


@contextmanager
def _processes(config: FederateConfig) -> Iterator[tuple[Processes, str]]:
    """The processes of torchrun and this one's device; torch has the run's number of threads in the block."""
    with torch_threads(config.threads), processes_of_torchrun(config.device) as (processes, device):
        yield processes, device
