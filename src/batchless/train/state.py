"""What a checkpoint holds of a training, and how it goes on from there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from batchless.runs import load_model_state
from batchless.train.average import ParameterAverage


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        images: training images seen.
        seconds: of training, without evaluations and saving.
        evaluations: how many of the planned ones are done.
        best: the main figure of the best one.
        metrics_bytes: length of `metrics.jsonl` when this was saved.
    """

    images: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    best: float | None = None
    metrics_bytes: int = 0


def checkpoint_state(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler | None,
    average: ParameterAverage | None,
    progress: Progress,
) -> dict[str, Any]:
    """`model`: the state dict to use (the average, if there is one); `training`: what only going on needs."""
    training: dict[str, Any] = {"optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    if scaler is not None:
        training["scaler"] = scaler.state_dict()
    if average is None:
        return {"model": model.state_dict(), "images": progress.images, "training": training}
    training |= {"raw_model": model.state_dict(), "average_steps": average.steps}
    return {"model": average.model.state_dict(), "images": progress.images, "training": training}


def restore(
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler | None,
    average: ParameterAverage | None,
) -> Progress:
    """Put everything back as `checkpoint_state` found it.

    Raises:
        ValueError: a checkpoint without training state (`best.pt`), or of another training.
    """
    training = checkpoint.get("training")
    if not isinstance(training, Mapping):
        raise ValueError("this checkpoint holds a model only, not a training that can go on: resume from last.pt")
    try:
        if (average is None) == ("raw_model" in training) or (scaler is None) == ("scaler" in training):
            raise ValueError("other settings of average or precision")
        load_model_state(model, training.get("raw_model", checkpoint["model"]), source="the checkpoint")
        if average is not None:
            load_model_state(average.model, checkpoint["model"], source="the checkpoint")
            average.steps = int(training["average_steps"])
        if scaler is not None:
            scaler.load_state_dict(training["scaler"])
        optimizer.load_state_dict(training["optimizer"])
        return Progress(**training["progress"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint is of another training ({error}): resume with the run's own config.yaml"
        ) from error
