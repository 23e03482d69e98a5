"""The server's side of a round: from the clients' sums to the next state."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from batchless.federated.algorithms import Algorithm, Kind
from batchless.federated.server_optimizers import Average, ServerOptimizer
from batchless.federated.sharing import local_names, tensor_kinds
from batchless.federated.summing import RoundSum, pieces
from batchless.federated.update import ClientFailedError, Update
from batchless.nn.precision import at_least_float32

_MOST_IMAGES = 2**53
"""Weights are numbers of images, or 1; times a larger one finite values would become infinite in the sum."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ServerState:
    """All that the server carries from round to round; tensors on the CPU, by state-dict key.

    Attributes:
        shared: the averaged tensors.
        initial: the first values of those that stay with the clients, with which a new client begins; together with
            `shared` they are a whole network.
        server_optimizer: moments of the server optimizer, by tensor and name.
        round: rounds done.
        planned_rounds: T, which learning-rate schedules and FixBN go by.
    """

    shared: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    server_optimizer: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    round: int = 0
    planned_rounds: int

    def __post_init__(self) -> None:
        if not 0 <= self.round <= self.planned_rounds or self.planned_rounds < 1:
            raise ValueError(
                f"round {self.round} of {self.planned_rounds}: plan 1 round or more, and do no more than planned"
            )


def initial_state(model: nn.Module, algorithm: Algorithm, planned_rounds: int) -> ServerState:
    """The state before the first round, with copies of the tensors of `model`."""
    local = local_names(algorithm, tensor_kinds(model))
    copies = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    return ServerState(
        shared={name: tensor for name, tensor in copies.items() if name not in local},
        initial={name: tensor for name, tensor in copies.items() if name in local},
        planned_rounds=planned_rounds,
    )


@torch.no_grad()
def aggregate(
    update: RoundSum,
    state: ServerState,
    algorithm: Algorithm,
    kinds: Mapping[str, Kind],
    trainable: Collection[str],
    *,
    means: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """The state after the round that `update` is the sum of; nothing is changed in place.

    Counters are the maximum, in their own type. Of everything else the mean is taken in float64 and rounded once; the server
    optimizer steps towards it for trainable tensors only, since a running variance that overshoots can become negative.

    Args:
        update: of all clients of the round (`sum_in_blocks`).
        state: before the round.
        algorithm: its server optimizer.
        kinds: of the network's tensors (`tensor_kinds`).
        trainable: the names of the trainable ones (`trainable_tensors`).
        means: of the float tensors, float64, where they are not the weighted ones: noised (`ClientNoise.mean`).

    Raises:
        ValueError: no client is left in the update, and no means are given.
    """
    if means is None and not update.weight > 0:
        raise ValueError(f"no client is left in round {state.round + 1}: nothing to average{_reasons(update)}")
    shared: dict[str, Tensor] = {}
    moments: dict[str, Mapping[str, Tensor]] = {}
    for name, before in state.shared.items():
        if kinds[name] == "counter":
            shared[name] = update.counters.get(name, before).clone()
            continue
        total, weight = (update.sums[name], update.weight) if means is None else (means[name], 1.0)
        server = algorithm.server if name in trainable else Average()
        shared[name], new = _step(server, before, total, weight, state.server_optimizer.get(name, {}))
        if new:
            moments[name] = new
    return ServerState(
        shared=shared,
        initial=state.initial,
        server_optimizer=moments,
        round=state.round + 1,
        planned_rounds=state.planned_rounds,
    )


def _step(
    server: ServerOptimizer, before: Tensor, total: Tensor, weight: float, moments: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One tensor's step from `before` towards `total / weight`, piece by piece, so that what is float64 stays in the cache."""
    value = torch.empty(before.shape, dtype=before.dtype)
    new: dict[str, Tensor] = {}
    flat, flat_before, flat_total = value.view(-1), before.reshape(-1), total.reshape(-1)
    for piece in pieces(value.numel()):
        known = {key: moment.reshape(-1)[piece].double() for key, moment in moments.items()}
        flat[piece], found = server.step(flat_before[piece], flat_total[piece] / weight, known)
        for key, moment in found.items():
            if key not in new:
                new[key] = torch.empty(before.shape, dtype=at_least_float32(before.dtype))
            new[key].view(-1)[piece] = moment
    return value, new


def require_usable(update: Update, state: ServerState, *, client: int) -> None:
    """Raise ClientFailedError if the update of one client, from wherever it comes, does not fit the state or is not finite.

    A value that was not finite when the round began (a memory of infinitely many images) may stay so.
    """
    found = {**update.values, **update.counters}
    if odd := sorted(found.keys() ^ state.shared.keys()):
        raise ClientFailedError(
            client, f"sent {'no ' if odd[0] in state.shared else ''}{odd[0]}: is its network the server's?"
        )
    if state.shared and not 0 < update.weight <= _MOST_IMAGES:
        raise ClientFailedError(
            client, f"sent the weight {update.weight}: it must be above 0, and at most {_MOST_IMAGES:g}"
        )
    for name, value in found.items():
        _require_fits(client, name, value, state.shared[name])
    for owner, tensors in update.local.items():
        if owner != client or tensors.keys() != state.initial.keys():
            raise ClientFailedError(client, f"brought local tensors of client {owner} that are not this network's")
        for name, value in tensors.items():
            _require_fits(client, name, value, state.initial[name])


def _require_fits(client: int, name: str, value: Tensor, before: Tensor) -> None:
    if value.shape != before.shape:
        raise ClientFailedError(
            client, f"{name} has the shape {tuple(value.shape)}, the server's is {tuple(before.shape)}"
        )
    # The sum over all elements tells at the price of one pass: NaN and infinity do not vanish in it (finite values may
    # overflow, so that each is looked at then).
    suspicious = value.is_floating_point() and not math.isfinite(float(value.sum()))
    if suspicious and not bool((value.isfinite() | (value == before)).all()):
        raise ClientFailedError(
            client, f"{name} became NaN or infinite: lower the learning rate, or clip (adaptive_clipping=0.1)"
        )


def _reasons(update: RoundSum) -> str:
    reasons = [f"client {left.client}: {left.reason}" for left in update.left_out]
    return f" ({'; '.join(reasons[:3])}{'; ..' if len(reasons) > 3 else ''})" if reasons else ""
