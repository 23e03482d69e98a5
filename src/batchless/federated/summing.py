"""The sum of a round's updates, in an order that does not depend on who trains the clients."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchless.federated.update import LeftOut, Update

BLOCK = 8
"""Consecutive clients of a round that are summed in order."""

PIECE = 2**17
"""Elements that are worked on at a time: 1 MB of float64, which stays in the cache from one pass to the next."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundSum:
    """What the clients of a round have brought together.

    Attributes:
        weight: sum of the clients' weights.
        sums: float64 sum of weight * value of every averaged tensor, by its state-dict key.
        counters: the maximum of every integer tensor, in its own type.
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


class WeightedSum:
    """float64 sum of weight * value over clients, all tensors in one buffer.

    The buffer is used again after `clear`: new memory costs more than what is written to it.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.tensors: dict[str, Tensor] = {}
        self._empty = True
        self._shapes: dict[str, torch.Size] = {}
        self._flat = self._scratch = torch.empty(0, dtype=torch.float64)
        self._groups: list[_Group] = []

    def clear(self) -> None:
        """Nobody's sum; tensors handed out before are lost."""
        self.weight, self._empty = 0.0, True

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's values; ValueError if those before were of another network."""
        if not self._fits(values):
            if not self._empty:
                raise ValueError(f"these updates are of different networks or algorithms: {self._odd(values)}")
            self._lay_out(values)
        for group in self._groups:
            if len(group.names) > 1:
                torch._foreach_copy_(group.views, [values[name] for name in group.names])
                self._take(slice(group.begin, group.end), weight)
                continue
            value = values[group.names[0]].reshape(-1)
            for piece in pieces(group.end - group.begin):
                self._scratch[: piece.stop - piece.start].copy_(value[piece])
                self._take(slice(group.begin + piece.start, group.begin + piece.stop), weight)
        self.weight, self._empty = self.weight + weight, False

    def add_sum(self, other: "WeightedSum") -> None:
        """Add that of other clients of the same network, which is not empty."""
        assert self.tensors.keys() == other.tensors.keys()
        self._flat.add_(other._flat)
        self.weight += other.weight

    @property
    def empty(self) -> bool:
        """Whether nobody's values are in it."""
        return self._empty

    def _take(self, place: slice, weight: float) -> None:
        """Add what lies in the beginning of the scratch to this place."""
        values, into = self._scratch[: place.stop - place.start], self._flat[place]
        if self._empty:
            torch.mul(values, weight, out=into)
        else:
            into.add_(values if weight == 1.0 else values.mul_(weight))

    def _fits(self, values: Mapping[str, Tensor]) -> bool:
        return {name: value.shape for name, value in values.items()} == self._shapes

    def _odd(self, values: Mapping[str, Tensor]) -> str:
        if names := self._shapes.keys() ^ values.keys():
            return f"{min(names)} is in one of them only"
        name = next(name for name, shape in self._shapes.items() if shape != values[name].shape)
        return f"{name} has the shape {tuple(values[name].shape)}, it was {tuple(self._shapes[name])}"

    def _lay_out(self, values: Mapping[str, Tensor]) -> None:
        self._shapes = {name: value.shape for name, value in values.items()}
        numbers = [shape.numel() for shape in self._shapes.values()]
        self._flat = torch.empty(sum(numbers), dtype=torch.float64)
        self._scratch = self._flat.new_empty(min(PIECE, len(self._flat)))
        parts = torch.split(self._flat, numbers)
        shapes = self._shapes.items()
        self.tensors = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        self._groups = []
        begin = 0
        for (name, shape), count in zip(shapes, numbers, strict=True):
            if not self._groups or begin + count > self._groups[-1].begin + PIECE:
                self._groups.append(_Group(begin=begin, end=begin))
            group = self._groups[-1]
            group.names.append(name)
            if count <= PIECE:
                group.views.append(self._scratch[group.end - group.begin :][:count].view(shape))
            begin = group.end = begin + count


@dataclass(kw_only=True)
class _Group:
    """Tensors that lie one after the other in the buffer: one of any size, or small ones that are one piece together.

    Attributes:
        begin: of the first.
        end: of the last.
        names: of the tensors.
        views: by tensor, its place in the scratch; of no use for a single one.
    """

    begin: int
    end: int
    names: list[str] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)


def pieces(count: int) -> Iterator[slice]:
    """The pieces of `count` elements.

    >>> list(pieces(PIECE + 1))
    [slice(0, 131072, None), slice(131072, 131073, None)]
    """
    for begin in range(0, count, PIECE):
        yield slice(begin, min(begin + PIECE, count))


class SumMemory:
    """What rounds are summed in, one after the other: sums of all clients so far, and of the block that goes on."""

    def __init__(self) -> None:
        self.total, self.block = WeightedSum(), WeightedSum()

    def clear(self) -> None:
        """For a new round, which begins in the memory of the last one's sum: with one block no other is needed."""
        self.total, self.block = self.block, self.total
        self.total.clear()
        self.block.clear()

    def end_block(self) -> None:
        """Add the block to the sum of all."""
        if self.block.empty:
            return
        if self.total.empty:
            self.total, self.block = self.block, self.total
        else:
            self.total.add_sum(self.block)
        self.block.clear()


def sum_in_blocks(updates: Iterable[Update], *, memory: SumMemory | None = None) -> RoundSum:
    """The round's sum: blocks of 8 consecutive positions, each summed in order, then the blocks in order.

    The bits so depend on the positions alone, not on how many processes train the clients. An update is read before the next
    one is asked for, and then forgotten.

    Args:
        updates: of the round's clients in the order of their ids; one that failed keeps its position.
        memory: what the sums lie in; those of an earlier round with the same memory are lost. None: new.

    Raises:
        ValueError: a client comes twice, or updates are of different networks.
    """
    memory = SumMemory() if memory is None else memory
    memory.clear()
    counters: dict[str, Tensor] = {}
    local: dict[int, Mapping[str, Tensor]] = {}
    metrics: dict[str, dict[str, tuple[float, float]]] = {}
    left_out: list[LeftOut] = []
    images, seconds = 0, 0.0
    for position, update in enumerate(updates):
        if position % BLOCK == 0:
            memory.end_block()
        if update.left_out is not None:
            left_out.append(update.left_out)
            continue
        if twice := sorted(local.keys() & update.local.keys()):
            raise ValueError(f"client {twice[0]} has brought two updates: a client is in one place of a round")
        memory.block.add(update.values, update.weight)
        for name, value in update.counters.items():
            counters[name] = torch.maximum(counters[name], value) if name in counters else value.clone()
        local |= update.local
        _add_metrics(metrics, update.metrics)
        images, seconds = images + update.images, seconds + update.seconds
    memory.end_block()
    return RoundSum(
        weight=memory.total.weight,
        sums={} if memory.total.empty else dict(memory.total.tensors),
        counters=counters,
        local=local,
        metrics=metrics,
        images=images,
        seconds=seconds,
        left_out=tuple(left_out),
    )


def _add_metrics(
    metrics: dict[str, dict[str, tuple[float, float]]], more: Mapping[str, Mapping[str, tuple[float, float]]]
) -> None:
    for domain, named in more.items():
        own = metrics.setdefault(domain, {})
        for name, (total, count) in named.items():
            before = own.get(name, (0.0, 0.0))
            own[name] = (before[0] + total, before[1] + count)
