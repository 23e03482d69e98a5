"""What a round's clients bring: sums that add, in an order that does not depend on who adds them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 8
"""Consecutive clients of a round that are summed in order by one process."""


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
    """What one or several clients have brought to a round; `Update()` is nobody's, and `a + b` that of both together.

    Attributes:
        weight: sum of the clients' weights.
        sums: float64 sum of weight * value of every averaged tensor (parameters, not changes), by its state-dict key.
        counters: the maximum of every integer tensor.
        local: by client, the tensors that stay with it.
        metrics: by domain and name, a sum and how many it is over.
        images: training images seen.
        seconds: of training, of all clients together.
        left_out: the clients that failed.
    """

    weight: float = 0.0
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    local: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    left_out: tuple[LeftOut, ...] = ()

    def __add__(self, other: "Update") -> "Update":
        return self.plus(other)

    def plus(self, other: "Update", *, reuse: bool = False) -> "Update":
        """The update of both; with `reuse` the sums are added in this one's memory, which is then lost.

        ValueError if both have a client's local tensors, or if they are of different networks.
        """
        if twice := sorted(self.local.keys() & other.local.keys()):
            raise ValueError(f"client {twice[0]} is in both updates: a client is in one place of a round")
        return Update(
            weight=self.weight + other.weight,
            sums=_joined(self.sums, other.sums, torch.Tensor.add_ if reuse else torch.add),
            counters=_joined(self.counters, other.counters, torch.maximum),
            local={**self.local, **other.local},
            metrics=_joined_metrics(self.metrics, other.metrics),
            images=self.images + other.images,
            seconds=self.seconds + other.seconds,
            left_out=self.left_out + other.left_out,
        )


@dataclass(frozen=True, kw_only=True)
class WeightedSums:
    """weight * value of one client in float64, in memory that is used again: new memory costs more than what is written to it.

    Attributes:
        weight: the client's.
        memory: by name; what it held before is overwritten.
    """

    weight: float
    memory: dict[str, Tensor]

    def of(self, name: str, value: Tensor) -> Tensor:
        """On the CPU."""
        kept = self.memory.get(name)
        if kept is None or kept.shape != value.shape:
            kept = self.memory[name] = torch.empty(value.shape, dtype=torch.float64)
        kept.copy_(value)
        return kept if self.weight == 1.0 else kept.mul_(self.weight)


def failed(error: ClientFailedError) -> Update:
    """The update of a client that is left out: nothing but its name and the reason."""
    return Update(left_out=(LeftOut(client=error.client, reason=error.reason),))


def sum_of(updates: Iterable[Update]) -> Update:
    """The sum in the given order, added in place; the updates themselves are not changed."""
    total, own = Update(), False
    for update in updates:
        both = bool(total.sums) and bool(update.sums)
        total = total.plus(update, reuse=own)
        own = own or both
    return total


def add_in_blocks(updates_by_position: Mapping[int, Update]) -> Update:
    """The round's sum: blocks of 8 consecutive positions, each summed in order, then the blocks in order.

    The bits so depend on the positions alone, not on how many processes summed the blocks.

    Args:
        updates_by_position: by the client's position among the round's sampled clients in the order of their ids; a
            position may be missing, or its client left out.
    """
    blocks: dict[int, list[Update]] = {}
    for position in sorted(updates_by_position):
        blocks.setdefault(position // BLOCK, []).append(updates_by_position[position])
    return sum_of(sum_of(block) for block in blocks.values())


def _joined(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], join: Callable[[Tensor, Tensor], Tensor]
) -> Mapping[str, Tensor]:
    if not left or not right:
        return left or right
    if left.keys() != right.keys():
        odd = min(left.keys() ^ right.keys())
        raise ValueError(f"these updates are of different networks or algorithms: {odd} is in one of them only")
    return {name: join(value, right[name]) for name, value in left.items()}


def _joined_metrics(
    left: Mapping[str, Mapping[str, tuple[float, float]]], right: Mapping[str, Mapping[str, tuple[float, float]]]
) -> dict[str, dict[str, tuple[float, float]]]:
    joined = {domain: dict(named) for domain, named in left.items()}
    for domain, named in right.items():
        own = joined.setdefault(domain, {})
        for name, (total, count) in named.items():
            before = own.get(name, (0.0, 0.0))
            own[name] = (before[0] + total, before[1] + count)
    return joined
