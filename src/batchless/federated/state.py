"""What a checkpoint holds of a federated run, and how it goes on from there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchless.federated.algorithms import Algorithm, Standalone
from batchless.federated.engine import Locals
from batchless.federated.evaluation import mean_of
from batchless.federated.server import ServerState
from batchless.runs import load_checkpoint

KEPT = "kept by the client since round"
"""The one local tensor, a number, of a client that keeps its own where the server cannot see them (under Flower)."""


def kept_elsewhere(round: int) -> dict[str, Tensor]:
    """What the server holds instead of a client's own tensors, which are as that round has left them."""
    return {KEPT: torch.tensor(round)}


@dataclass
class Progress:
    """How far a run is, besides its rounds, which the server's state counts.

    Attributes:
        images: training images seen, by all clients.
        seconds: of rounds, without evaluations and saving.
        bytes: sent to clients and back.
        left_out: how often a client was left out of a round.
        evaluated: the last round that was evaluated; 0: none.
        chosen: the evaluation with the best mean over the domains' validation images: `round`, `validation_accuracy`,
            `test_accuracy`, `domains`; None: no evaluation yet, or no validation images.
        metrics_bytes: length of `metrics.jsonl` when this was saved.
    """

    images: int = 0
    seconds: float = 0.0
    bytes: int = 0
    left_out: int = 0
    evaluated: int = 0
    chosen: dict[str, Any] | None = None
    metrics_bytes: int = 0


def checkpoint_state(state: ServerState, locals: Locals, algorithm: Algorithm, progress: Progress) -> dict[str, Any]:
    """`model`, a whole network; `locals`, what stays with each client; `training`, what only going on needs.

    `model` is the global network. Where layers stay with the clients it has the mean of theirs, and for `Standalone`, where
    there is nothing global, the network of the first client; `client_checkpoint` gives that of any client. Where clients keep
    their layers to themselves (under Flower) it has the initial ones.
    """
    return {
        "model": network(state, _middle(state, locals, algorithm)),
        "locals": {client: dict(local) for client, local in locals.items()},
        "images": progress.images,
        "round": state.round,
        "training": {
            "shared": dict(state.shared),
            "initial": dict(state.initial),
            "server_optimizer": {name: dict(moments) for name, moments in state.server_optimizer.items()},
            "planned_rounds": state.planned_rounds,
            "progress": asdict(progress),
        },
    }


def restore(
    checkpoint: Mapping[str, Any], fresh: ServerState
) -> tuple[ServerState, dict[int, dict[str, Tensor]], Progress]:
    """The server's state, the clients' own tensors and the progress as `checkpoint_state` found them.

    Args:
        checkpoint: of this run.
        fresh: the state before its first round, to see whether the checkpoint is of the same network.

    Raises:
        ValueError: a checkpoint that holds no federated run, or one of another network or algorithm.
    """
    training = checkpoint.get("training")
    if not isinstance(training, Mapping) or "shared" not in training:
        raise ValueError("this checkpoint holds no federated run that can go on: resume from last.pt of such a run")
    try:
        state = ServerState(
            shared=training["shared"],
            initial=training["initial"],
            server_optimizer=training["server_optimizer"],
            round=checkpoint["round"],
            planned_rounds=training["planned_rounds"],
        )
        for then, now in ((state.shared, fresh.shared), (state.initial, fresh.initial)):
            if _shapes(then) != _shapes(now):
                raise ValueError("another network or algorithm")
        return (
            state,
            {int(client): dict(local) for client, local in checkpoint["locals"].items()},
            Progress(**training["progress"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint is of another run ({error}): resume with the run's own config.yaml"
        ) from error


def client_checkpoint(path: str | Path, client: int) -> dict[str, Any]:
    """The checkpoint at `path` with the network of one client as its `model`, for `save_checkpoint` and then export.

    ValueError if it is no checkpoint of a federated run, or if the client has no tensors of its own there.
    """
    checkpoint = load_checkpoint(path)
    if not isinstance(locals := checkpoint.get("locals"), Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise ValueError(f"{path} is no checkpoint of a federated run: give last.pt or best.pt of one")
    if client not in locals:
        having = ", ".join(map(str, sorted(locals))) or "none: the network is the same for all"
        raise ValueError(f"client {client} has no layers of its own in {path}; clients that have: {having}")
    if KEPT in locals[client]:
        raise ValueError(
            f"client {client} keeps its layers to itself: they are on its own disk, as of round {int(locals[client][KEPT])}"
        )
    model = {**checkpoint["model"], **locals[client]}
    return {**{key: value for key, value in checkpoint.items() if key not in ("training", "locals")}, "model": model}


def network(state: ServerState, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole network's state dict."""
    return {**state.initial, **state.shared, **local}


def _middle(state: ServerState, locals: Locals, algorithm: Algorithm) -> Mapping[str, Tensor]:
    if not locals or any(KEPT in local for local in locals.values()):
        return state.initial
    return locals[min(locals)] if isinstance(algorithm, Standalone) else mean_of(locals)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
