"""Privacy of clients: what each changes is clipped, and the server adds noise to the sum.

`w_{t+1} = w_t + (sum_k min(1, C / ||d_k||) d_k + z) / (q N)`, `d_k = w_k - w_t` over all shared float tensors together, buffers
included, `z ~ N(0, (sigma C)^2)` for every element, q N how many clients are expected, not how many came.

Source: McMahan et al., arXiv 1710.06963, algorithm 1 with the fixed-denominator estimator and flat clipping.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchless.federated.privacy import PrivacySettings
from batchless.federated.server import ServerState
from batchless.federated.summing import RoundSum
from batchless.federated.update import ClientFailedError, Update

_ROUNDING = 1e-9
"""Relative: by so much the norm of a clipped change may be off when it is computed again elsewhere."""


@dataclass(frozen=True, kw_only=True)
class ClientNoise:
    """What the server adds to the sum, and what it divides by.

    Attributes:
        privacy: C and sigma.
        expected_clients: q N, of a round.
        seed: of the run.
    """

    privacy: PrivacySettings
    expected_clients: float
    seed: int

    @torch.no_grad()
    def mean(self, update: RoundSum, state: ServerState) -> dict[str, Tensor]:
        """The noised mean of every float tensor, float64: `w_t + (sums - n w_t + z) / (q N)`, n the clients that came.

        A round to which nobody came is noise alone: that nobody came stays hidden.

        Args:
            update: of all clients of the round, each with weight 1 and clipped.
            state: before the round.
        """
        generator = self.privacy.generator("noise", state.round, seed=self.seed)
        means: dict[str, Tensor] = {}
        for name, before in state.shared.items():
            if not before.is_floating_point():
                continue
            start = before.double()
            change = update.sums[name] - update.weight * start if update.sums else torch.zeros_like(start)
            noise = torch.from_numpy(generator.standard_normal(start.shape)) if self.privacy.noise_multiplier else 0.0
            means[name] = start + (change + self.privacy.noise_std * noise) / self.expected_clients
        return means


def change_norm(values: Mapping[str, Tensor], state: ServerState) -> float:
    """`||d_k||` of one client's values, over all tensors together, float64."""
    squares = [float((value.double() - state.shared[name]).square().sum()) for name, value in values.items()]
    return math.sqrt(math.fsum(squares))


@torch.no_grad()
def clipped(update: Update, state: ServerState, *, clip_norm: float, client: int) -> Update:
    """One client's update with its change scaled down to `clip_norm`; as it is, bit for bit, where it is no larger.

    Scaled values are in float64: rounded to the network's type they could lie outside of the bound.

    Raises:
        ClientFailedError: an integer tensor has changed, which no noise can cover.
    """
    _require_no_counts(update, state, client=client)
    norm = change_norm(update.values, state)
    if norm <= clip_norm:
        return update
    factor = clip_norm / norm
    starts = {name: state.shared[name].double() for name in update.values}
    return replace(
        update, values={name: starts[name] + factor * (value - starts[name]) for name, value in update.values.items()}
    )


def require_clipped(update: Update, state: ServerState, *, clip_norm: float, client: int) -> None:
    """ClientFailedError if an update that comes from elsewhere is no clipped one with weight 1."""
    if update.weight != 1.0:
        raise ClientFailedError(client, f"sent the weight {update.weight}: with privacy.level=client it is 1")
    _require_no_counts(update, state, client=client)
    norm = change_norm(update.values, state)
    if not norm <= clip_norm * (1 + _ROUNDING):
        raise ClientFailedError(client, f"its change has the norm {norm:.6g}, privacy.clip_norm is {clip_norm:g}")


def _require_no_counts(update: Update, state: ServerState, *, client: int) -> None:
    for name, value in update.counters.items():
        if not torch.equal(value, state.shared[name]):
            raise ClientFailedError(client, f"privacy.level=client: {name} counts something, which no noise covers")
