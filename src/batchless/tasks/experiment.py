"""From a resolved configuration to a trained model in a run folder, and on from where a run was interrupted."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchless.models.weights import load_weights
from batchless.runs import RunFolder, load_checkpoint
from batchless.runs.atomic import write_text
from batchless.runs.folder import strict_json
from batchless.surgery import ConversionReport, lean
from batchless.surgery.dataflow import as_arguments
from batchless.tasks.config import TrainConfig
from batchless.tasks.kind import Setup
from batchless.tasks.setup import TASKS, set_up
from batchless.tasks.trained import build_converted, build_plain, example_input
from batchless.train import Processes, processes_of_torchrun
from batchless.train.device import require_device
from batchless.train.interrupt import ShouldStop, never_stop
from batchless.train.loop import OnProgress, ignore_progress, train
from batchless.train.run_ends import begun, failure_told, on_first


@dataclass(frozen=True)
class FinishedRun:
    """The result of a run.

    Attributes:
        folder: where everything is.
        summary: the final figures.
        conversion: what the normalizer's name did to the network.
        notes: what was found in the data, and what of the pretrained weights was taken.
    """

    folder: Path
    summary: Mapping[str, float]
    conversion: ConversionReport
    notes: tuple[str, ...]


def run_training(
    config: TrainConfig, on_progress: OnProgress = ignore_progress, *, should_stop: ShouldStop = never_stop
) -> FinishedRun:
    """Train as `config` says; the run folder gets `failed` as its summary if that is not possible.

    Under torchrun all processes share each step's micro-batches, and the first one writes.

    Raises:
        ValueError: a wrong setting (nothing is written), or a failure while training (the folder says so).
        TrainingStoppedError: `should_stop()` became true; `resume_training` goes on.
    """
    with processes_of_torchrun(config.device) as (processes, device):
        prepared = _prepare(config, device)
        run = on_first(processes, lambda: _new_run(config, prepared))
        return _train(prepared, run, processes, on_progress, should_stop, resume_from=None)


def resume_training(
    folder: str | Path,
    on_progress: OnProgress = ignore_progress,
    *,
    should_stop: ShouldStop = never_stop,
    device: str | None = None,
    root: str | None = None,
) -> FinishedRun:
    """Go on with the run in `folder` from its last checkpoint, to the same bits as if it had never been interrupted.

    Args:
        folder: of a run that was interrupted or has failed.
        on_progress: shows the progress.
        should_stop: as for `run_training`.
        device: another device than before; None: the same.
        root: where the data lies now; None: where it lay.

    Raises:
        ValueError: no run, one that has ended, one in use by another process, a damaged or foreign checkpoint.
        TrainingStoppedError: as for `run_training`.
    """
    config = begun(folder, TrainConfig, device=device, root=root)
    last = config.folder() / "checkpoints" / "last.pt"
    with processes_of_torchrun(config.device) as (processes, own_device):
        prepared = _prepare(config, own_device)
        checkpoint = load_checkpoint(last) if last.exists() else None
        images = 0 if checkpoint is None else _images(checkpoint, last)
        run = on_first(
            processes, lambda: RunFolder.resume(config.folder(), images=images, tensorboard=config.tensorboard)
        )
        if run is not None and checkpoint is None:
            run.forget_metrics_after(0)
        return _train(prepared, run, processes, on_progress, should_stop, resume_from=checkpoint)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    config: TrainConfig
    device: str
    setup: Setup[Any]
    model: nn.Module
    conversion: ConversionReport
    notes: tuple[str, ...]


def _prepare(config: TrainConfig, device: str) -> _Prepared:
    """Everything that can be wrong, before anything is written."""
    require_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    setup = set_up(config)
    torch.manual_seed(config.seed)
    model = build_plain(config, num_classes=len(setup.classes))
    notes = setup.notes
    if config.weights is not None:
        body = TASKS[config.task].pretrained(model)
        notes += load_weights(body, config.weights, part=body is not model)
    require_runs(model, example_input(config, model), config)
    model, report = build_converted(config, model)
    if not report.replaced and report.normalizer != "bn":
        raise ValueError(
            f"{config.model} has nothing that {report.normalizer} replaces: choose a network with batch normalization, or bn"
        )
    if config.lean:
        model, _ = lean(model, config.lean)
    return _Prepared(config=config, device=device, setup=setup, model=model, conversion=report, notes=notes)


def _new_run(config: TrainConfig, prepared: _Prepared) -> RunFolder:
    run = RunFolder.create(config.folder(), config=config.plain(), seed=config.seed, tensorboard=config.tensorboard)
    try:
        notes = "".join(f"{note}\n" for note in prepared.notes)
        write_text(run.path / "conversion.txt", f"{notes}{prepared.conversion}\n")
        records = prepared.conversion.records() | {"weights": list(prepared.notes)}
        write_text(run.path / "conversion.json", strict_json(records, indent=1))
    except BaseException:
        run.release()
        raise
    return run


def _train(
    prepared: _Prepared,
    run: RunFolder | None,
    processes: Processes,
    on_progress: OnProgress,
    should_stop: ShouldStop,
    *,
    resume_from: Mapping[str, Any] | None,
) -> FinishedRun:
    config, setup = prepared.config, prepared.setup
    about = {
        "config": config.plain(),
        "classes": list(setup.classes),
        "mean": list(setup.statistics.mean),
        "std": list(setup.statistics.std),
    }
    with nullcontext() if run is None else run, failure_told(run, lambda error: _explained(error, config)):
        summary = train(
            prepared.model,
            setup.task,
            setup.data,
            config.loop_settings(device=prepared.device),
            run,
            on_progress,
            about=about,
            resume_from=resume_from,
            processes=processes,
            should_stop=should_stop,
        )
    return FinishedRun(folder=config.folder(), summary=summary, conversion=prepared.conversion, notes=prepared.notes)


def _explained(error: Exception, config: TrainConfig) -> Exception:
    """The error with its fix, where torch says only that a layer's statistics would be of one value."""
    text, few = str(error), config.images_per_forward
    if not text.startswith("Expected more than 1 value per channel"):
        return error
    return ValueError(
        f"{text}: in {config.model} a normalization with batch statistics meets maps of 1x1, which at images_per_forward={few} "
        "(or what an epoch leaves of it) give one value per channel: choose a normalizer without them (gn, ln, bcn-micro), or "
        f"more images_per_forward; batchless doctor {config.model} --images_per_forward {few} names the layers"
    )


def _images(checkpoint: Mapping[str, Any], path: Path) -> int:
    try:
        return int(checkpoint["training"]["progress"]["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no training that can go on: put a last.pt of this run there, or remove it to start again"
        ) from error


@torch.no_grad()
def require_runs(model: nn.Module, example: object, config: TrainConfig) -> None:
    """Raise ValueError if the network does not take the example, which has the configured size."""
    model.eval()
    try:
        model(*as_arguments(example))
    except Exception as error:  # a network that was built for other images can raise anything
        size, settings = TASKS[config.task].size(config)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{config.model} does not run on {size} images ({reason}): choose another {settings} or model"
        ) from error
    model.train()
