"""What one client brings to a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


class ClientFailedError(ValueError):
    """A client's result cannot be used; the round goes on without it.

    Attributes:
        client: its id.
        reason: one line.
    """

    def __init__(self, client: int, reason: str) -> None:
        super().__init__(client, reason)  # both, so that it can be pickled
        self.client, self.reason = client, " ".join(reason.split())

    def __str__(self) -> str:
        return f"client {self.client}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A client of the round that is not in the sum.

    Attributes:
        client: its id.
        reason: one line.
    """

    client: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """What one client has brought to a round.

    Attributes:
        weight: of its values in the mean, above 0.
        values: every averaged tensor (parameters, not changes) by its state-dict key, on the CPU; in the network's types, in
            float64 where clipped. They may be the network's own tensors: read them before it trains again.
        counters: the integer tensors.
        local: by client, the tensors that stay with it.
        metrics: by domain and name, a sum and how many it is over.
        images: training images seen.
        seconds: of training.
        left_out: the client itself, if it failed; then nothing else is given.
    """

    weight: float = 0.0
    values: Mapping[str, Tensor] = field(default_factory=dict)
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    local: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    left_out: LeftOut | None = None


def failed(error: ClientFailedError) -> Update:
    """The update of a client that is left out: nothing but its name and the reason."""
    return Update(left_out=LeftOut(client=error.client, reason=error.reason))
