"""Clients trained by the processes of torchrun, on one machine or several; the first one sums and decides."""

import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_FOREVER = timedelta(days=30)
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


class UnresponsiveError(ValueError):
    """A process of torchrun has ended or does not answer. It cannot be replaced, and the others cannot be told."""


class _LateError(Exception):
    """The alarm of this process."""


@dataclass(frozen=True, kw_only=True)
class _Parcel:
    """An update on its way: the tensors follow."""

    update: Update
    places: tuple[Place, ...]
    bytes: int


class RankEngine:
    """An `Engine` over the processes of torchrun, position p of a round on process p modulo their number.

    The first process uses it as any engine and ends it by `end`; on the others `follow` does what it says. A process that
    ends or takes too long ends the run by an UnresponsiveError on the first one, with which torchrun ends the others: what
    it had to send cannot be told from what comes after it, and nobody may take its place.

    Args:
        workplace: of this process.
        state: of the first round, the same on all.
        processes: this one and how many there are.
        timeout: seconds for a client's round, and for a process's share of an evaluation; None: no limit. In the first process
            itself it is kept by an alarm signal, which needs the main thread and Python to be running.
    """

    def __init__(
        self, workplace: Workplace, state: ServerState, processes: Processes, *, timeout: float | None = None
    ) -> None:
        self.workplace, self.clients, self.processes = workplace, workplace.clients(), processes
        self.timeout = timeout
        # Tensors of rounds are on the CPU, whatever the device; and a client may take its time.
        self.group: Any = dist.new_group(backend="gloo", timeout=_FOREVER)
        self.start, self.shared = state, Packed.of(state.shared)
        self.inbox: dict[tuple[Place, ...], Tensor] = {}

    def updates(self, state: ServerState, chosen: Sequence[int], locals: Locals) -> Iterator[Update]:
        """As `Engine.updates`."""
        own = {client: locals[client] for client in chosen if client in locals}
        self._tell(_Round(round=state.round, chosen=tuple(chosen), locals=own), state)
        for position, client in enumerate(chosen):
            rank = position % self.processes.count
            if rank:
                yield self._receive(rank, f"client {client}")
            else:
                with self._alarm(f"client {client}"):
                    update = self.workplace.train(state, self.clients[client], locals.get(client))
                yield update

    def figures(self, state: ServerState, locals: Locals) -> Figures:
        """As `Engine.figures`; each process evaluates some of the domains."""
        self._tell(_Evaluate(round=state.round, locals=locals), state)
        with self._alarm("its share of the evaluation"):
            found = dict(self._own_figures(state, locals))
        for rank in range(1, self.processes.count):
            found |= self._receive_object(rank, "its share of the evaluation")
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
                self._send(self._own_figures(state, order.locals)).wait()

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
            update = self.workplace.train(state, self.clients[client], order.locals.get(client))
            packed = Packed.of(tensors_of(update))
            about = _Parcel(update=without_tensors(update), places=packed.places, bytes=packed.buffer.numel())
            sent.append(self._send(about, packed.buffer))
        for parcel in sent:
            parcel.wait()

    def _send(self, about: object, *buffers: Tensor) -> "_Sent":
        header = torch.frombuffer(bytearray(pickle.dumps(about)), dtype=torch.uint8)
        sent = _Sent()
        for tensor in (torch.tensor([len(header)]), header, *buffers):
            if tensor.numel():
                sent.works.append((dist.isend(tensor, 0, group=self.group), tensor))
        return sent

    def _receive(self, rank: int, what: str) -> Update:
        about: _Parcel = self._receive_object(rank, what)
        # Kept for the next update of the same form: memory that has just been mapped is slow.
        buffer = self.inbox.setdefault(about.places, torch.empty(0, dtype=torch.uint8))
        if buffer.numel() != about.bytes:
            buffer = self.inbox[about.places] = torch.empty(about.bytes, dtype=torch.uint8)
        if about.bytes:
            self._fill(buffer, rank, what)
        return with_tensors(about.update, Packed(about.places, buffer).tensors())

    def _receive_object(self, rank: int, what: str) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        self._fill(length, rank, what)
        header = torch.empty(int(length), dtype=torch.uint8)
        self._fill(header, rank, what)
        return pickle.loads(header.numpy().tobytes())

    def _fill(self, tensor: Tensor, rank: int, what: str) -> None:
        """Receive the tensor from that process, which has begun with `what` already: the process before was not waited for."""
        begun = time.monotonic()
        try:
            work: Any = dist.irecv(tensor, rank, group=self.group)
            work.wait(_FOREVER if self.timeout is None else timedelta(seconds=self.timeout))
        except RuntimeError as error:
            late = self.timeout is not None and time.monotonic() - begun >= self.timeout
            raise UnresponsiveError(self._late(rank, what) if late else f"process {rank} ended at {what}") from error

    def _late(self, rank: int, what: str) -> str:
        return (
            f"process {rank} was not done with {what} after client_timeout={self.timeout:g} seconds; a process of torchrun "
            "cannot be replaced: look why it hangs, or give more client_timeout, then go on with the run"
        )

    @contextmanager
    def _alarm(self, what: str) -> Iterator[None]:
        """End the block, in the first process, when the time is up."""
        main = threading.current_thread() is threading.main_thread()
        if self.timeout is None or not main or not hasattr(signal, "setitimer"):
            yield
            return

        def ring(number: int, frame: object) -> None:
            raise _LateError

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.timeout)
        try:
            yield
        except _LateError as error:
            raise UnresponsiveError(self._late(0, what)) from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@dataclass
class _Sent:
    """Tensors on their way, kept until they have arrived."""

    works: list[tuple[Any, Tensor]] = field(default_factory=list)

    def wait(self) -> None:
        for work, _ in self.works:
            work.wait()
