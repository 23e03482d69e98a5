"""Clients trained by the processes of torchrun, on one machine or several; the first one sums and decides."""

import pickle
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchless.federated.engine import Figures, Locals, Workplace
from batchless.federated.packing import Packed, Place, tensors_of, with_tensors, without_tensors
from batchless.federated.server import ServerState
from batchless.federated.update import Update
from batchless.train import Processes

_PENDING = 2
"""Updates that a process may have trained and not yet handed over."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What the first process tells the others."""

    round: int
    chosen: tuple[int, ...]
    locals: Locals


@dataclass(frozen=True, kw_only=True)
class _Evaluate:
    round: int
    locals: Locals


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The last thing that the first process tells the others.

    Attributes:
        outcome: what it returns.
        error: the message of the ValueError it raises instead.
        stopped: images seen when it was asked to stop.
    """

    outcome: Any = None
    error: str | None = None
    stopped: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Parcel:
    """An update on its way: the tensors follow."""

    update: Update
    places: tuple[Place, ...]
    bytes: int


class RankEngine:
    """An `Engine` over the processes of torchrun, position p of a round on process p modulo their number.

    The first process uses it as any engine and ends it by `end`; on the others `follow` does what it says.

    Args:
        workplace: of this process.
        state: of the first round, the same on all.
        processes: this one and how many there are.
    """

    def __init__(self, workplace: Workplace, state: ServerState, processes: Processes) -> None:
        self.workplace, self.clients, self.processes = workplace, workplace.clients(), processes
        # Tensors of rounds are on the CPU, whatever the device; and a client may take its time.
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        self.start, self.shared = state, Packed.of(state.shared)
        self.inbox: dict[tuple[Place, ...], Tensor] = {}

    def updates(self, state: ServerState, chosen: Sequence[int], locals: Locals) -> Iterator[Update]:
        """As `Engine.updates`."""
        own = {client: locals[client] for client in chosen if client in locals}
        self._tell(_Round(round=state.round, chosen=tuple(chosen), locals=own), state)
        for position, client in enumerate(chosen):
            rank = position % self.processes.count
            if rank == 0:
                yield self.workplace.train(state, self.clients[client], locals.get(client))
            else:
                yield self._receive(rank)

    def figures(self, state: ServerState, locals: Locals) -> Figures:
        """As `Engine.figures`; each process evaluates some of the domains."""
        self._tell(_Evaluate(round=state.round, locals=locals), state)
        parts: list[Any] = [None] * self.processes.count
        dist.gather_object(self._own_figures(state, locals), parts, group=self.group)
        found = {domain: figures for part in parts for domain, figures in part.items()}
        return {domain: found[domain] for domain in self.workplace.federation.domains}

    def end(self, ended: Ended) -> None:
        """Let the others know; between rounds only."""
        dist.broadcast_object_list([ended], group=self.group)

    def follow(self) -> Ended:
        """What the others do: rounds and evaluations, until the first process has ended."""
        while True:
            orders: list[Any] = [None]
            dist.broadcast_object_list(orders, group=self.group)
            (order,) = orders
            if isinstance(order, Ended):
                return order
            dist.broadcast(self.shared.buffer, 0, group=self.group)
            state = replace(self.start, shared=self.shared.tensors(), round=order.round)
            if isinstance(order, _Round):
                self._train_own(state, order)
            else:
                dist.gather_object(self._own_figures(state, order.locals), None, group=self.group)

    def _tell(self, order: _Round | _Evaluate, state: ServerState) -> None:
        dist.broadcast_object_list([order], group=self.group)
        self.shared.write(state.shared)
        dist.broadcast(self.shared.buffer, 0, group=self.group)

    def _own_figures(self, state: ServerState, locals: Locals) -> Mapping[str, Mapping[str, float]]:
        domains = self.workplace.federation.domains[self.processes.rank :: self.processes.count]
        return self.workplace.evaluate(state, locals, domains) if domains else {}

    def _train_own(self, state: ServerState, order: _Round) -> None:
        sent: deque[_Sent] = deque()
        for client in order.chosen[self.processes.rank :: self.processes.count]:
            if len(sent) == _PENDING:
                sent.popleft().wait()
            sent.append(self._send(self.workplace.train(state, self.clients[client], order.locals.get(client))))
        for parcel in sent:
            parcel.wait()

    def _send(self, update: Update) -> "_Sent":
        packed = Packed.of(tensors_of(update))
        about = _Parcel(update=without_tensors(update), places=packed.places, bytes=packed.buffer.numel())
        header = torch.frombuffer(bytearray(pickle.dumps(about)), dtype=torch.uint8)
        sent = _Sent()
        for tensor in (torch.tensor([len(header)]), header, packed.buffer):
            if tensor.numel():
                sent.works.append((dist.isend(tensor, 0, group=self.group), tensor))
        return sent

    def _receive(self, rank: int) -> Update:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, rank, group=self.group)
        header = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(header, rank, group=self.group)
        about: _Parcel = pickle.loads(header.numpy().tobytes())
        # Kept for the next update of the same form: memory that has just been mapped is slow.
        buffer = self.inbox.setdefault(about.places, torch.empty(0, dtype=torch.uint8))
        if buffer.numel() != about.bytes:
            buffer = self.inbox[about.places] = torch.empty(about.bytes, dtype=torch.uint8)
        if about.bytes:
            dist.recv(buffer, rank, group=self.group)
        return with_tensors(about.update, Packed(about.places, buffer).tensors())


@dataclass
class _Sent:
    """Tensors on their way, kept until they have arrived."""

    works: list[tuple[Any, Tensor]] = field(default_factory=list)

    def wait(self) -> None:
        for work, _ in self.works:
            work.wait()
