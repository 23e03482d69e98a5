"""Clients trained by processes of this machine, each with one network; tensors travel in shared memory."""

import math
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_context  # whose pipes send tensors as files of shared memory

from batchless.federated.engine import Figures, Locals, Workplace, needed_locals
from batchless.federated.packing import (
    Packed,
    joined_locals,
    require_shared_memory,
    separate_locals,
    tensors_of,
    with_tensors,
    without_tensors,
)
from batchless.federated.server import ServerState
from batchless.federated.update import ClientFailedError, Update, failed
from batchless.runs.atomic import reason

_AHEAD = 3
"""Positions per worker that may be trained before the first of them is summed: a slow client makes the others wait then."""


@dataclass(frozen=True, kw_only=True)
class _Train:
    """An order to a worker."""

    client: int
    round: int
    slot: int
    local: Packed | None


@dataclass(frozen=True, kw_only=True)
class _Evaluate:
    """An order to a worker."""

    domain: str
    round: int
    locals: Packed


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A worker's answer: the tensors lie in its slot, which comes along when it is new."""

    update: Update
    new: Packed | None


@dataclass(frozen=True, kw_only=True)
class _Broke:
    """A worker's answer: an error that is not a client's."""

    message: str
    mistake: bool
    trace: str


@dataclass(frozen=True, kw_only=True)
class _Lost:
    """In place of an answer: the worker is gone, and has been replaced."""

    reason: str
    fix: str


_READY = "ready"


@dataclass(kw_only=True, eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    order: _Train | _Evaluate | None = None
    begun: float = 0.0
    position: int = -1
    slots: dict[int, Packed] = field(default_factory=dict)
    numbers: int = 0
    free: list[int] = field(default_factory=list)

    def take_slot(self) -> int:
        """The number of one that nobody reads; the one used last, whose memory is warm."""
        if not self.free:
            self.free.append(self.numbers)
            self.numbers += 1
        return self.free.pop()

    def opened(self, answer: "_Trained", slot: int) -> Update:
        """The update, its values still in the slot; the worker is idle."""
        self.order = None
        if answer.new is not None:
            self.slots[slot] = answer.new
        empty = answer.update.left_out is not None  # a client that failed brings no tensors
        return answer.update if empty else with_tensors(answer.update, self.slots[slot].tensors())

    def release(self, slot: int) -> None:
        """The slot has been read, or its client has brought nothing."""
        self.free.append(slot)


class WorkerEngine:
    """An `Engine` whose clients are trained by processes started here; a context manager that ends them.

    A worker that dies, or that does not answer in time, costs its client's part in the round, and is replaced.

    Args:
        workplace: what each of them has.
        state: of the first round.
        count: workers.
        threads: of torch, in each.
        timeout: seconds for a client's round or a domain's evaluation; None: no limit.

    Raises:
        ValueError: the machine's shared memory is too small, or workers cannot be started.
    """

    def __init__(
        self, workplace: Workplace, state: ServerState, *, count: int, threads: int, timeout: float | None = None
    ) -> None:
        self.workplace, self.threads, self.timeout = workplace, threads, timeout
        clipped = workplace.settings.privacy.level == "client"
        require_shared_memory({**state.shared, **state.initial}, count, clipped=clipped)
        self.shared = Packed.of(state.shared).in_shared_memory()
        self.initial = Packed.of(state.initial)
        self.planned_rounds = state.planned_rounds
        # As bytes: a network's many tensors would each keep a file of shared memory open in every process.
        self.model = pickle.dumps(workplace.model.to("cpu"))
        workplace.model.to(workplace.settings.device)
        self.workers: list[_Worker] = []
        try:
            for _ in range(count):
                self.workers.append(self._started())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WorkerEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers: they have nothing to save."""
        for worker in self.workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
        self.workers = []

    def updates(self, state: ServerState, chosen: Sequence[int], locals: Locals) -> Iterator[Update]:
        """As `Engine.updates`."""
        self.shared.write(state.shared)  # nobody reads it: between rounds all workers wait
        waiting = deque(enumerate(chosen))
        arrived: dict[int, tuple[Update, _Worker, int]] = {}
        position = 0
        while position < len(chosen):
            for worker in self._idle():
                if waiting and waiting[0][0] < position + _AHEAD * len(self.workers):
                    at, client = waiting.popleft()
                    local = locals.get(client)
                    packed = None if local is None else Packed.of(local)
                    slot = worker.take_slot()
                    self._give(worker, _Train(client=client, round=state.round, slot=slot, local=packed), at)
            if position in arrived:
                update, owner, slot = arrived.pop(position)
                yield update
                owner.release(slot)
                position += 1
                continue
            for worker, answer in self._answers():  # then whoever is idle gets work before this one is summed
                order, at = worker.order, worker.position
                assert isinstance(order, _Train)
                if isinstance(answer, _Trained):
                    arrived[at] = worker.opened(answer, order.slot), worker, order.slot
                else:
                    arrived[at] = failed(ClientFailedError(order.client, answer.reason)), worker, order.slot

    def figures(self, state: ServerState, locals: Locals) -> Figures:
        """As `Engine.figures`; each domain is evaluated by one worker."""
        self.shared.write(state.shared)
        federation = self.workplace.federation
        waiting = deque(federation.domains)
        found: dict[str, Mapping[str, float]] = {}
        while len(found) < len(federation.domains):
            for worker in self._idle():
                if waiting:
                    domain = waiting.popleft()
                    packed = Packed.of(joined_locals(needed_locals(federation, locals, domain)))
                    self._give(worker, _Evaluate(domain=domain, round=state.round, locals=packed), -1)
            for worker, answer in self._answers():
                assert isinstance(worker.order, _Evaluate)
                if isinstance(answer, _Lost):
                    raise ValueError(f"evaluation of {worker.order.domain} failed: {answer.reason}; {answer.fix}")
                found[worker.order.domain] = answer
                worker.order = None
        return {domain: found[domain] for domain in federation.domains}

    def _idle(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.order is None]

    def _give(self, worker: _Worker, order: _Train | _Evaluate, position: int) -> None:
        worker.order, worker.position, worker.begun = order, position, time.monotonic()
        with suppress(OSError):  # it has died: `_answers` notices
            worker.connection.send(order)

    def _answers(self) -> Iterator[tuple[_Worker, Any]]:
        """Wait for answers of busy workers; for one that has died or is late, what has happened, after it was replaced."""
        by_connection = {worker.connection: worker for worker in self.workers}
        for connection in wait(list(by_connection), timeout=self._patience()):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            try:
                answer = connection.recv()
            except (OSError, EOFError):
                how = self._replace(worker)
                if worker.order is not None:
                    yield worker, _Lost(reason=f"its process ended ({how})", fix="use fewer workers")
                continue
            if answer == _READY:
                worker.ready, worker.begun = True, time.monotonic()
            elif isinstance(answer, _Broke):
                raise ValueError(answer.message) if answer.mistake else RuntimeError(answer.trace)
            else:
                yield worker, answer
        for worker in list(self.workers):
            if self._left(worker) <= 0 and not worker.connection.poll():
                worker.process.kill()
                self._replace(worker)
                yield (
                    worker,
                    _Lost(reason=f"did not answer within {self.timeout:g} seconds", fix="give more client_timeout"),
                )

    def _left(self, worker: _Worker) -> float:
        """Seconds that a worker may still take; infinity for one that has nothing to do or has not begun."""
        if self.timeout is None or worker.order is None or not worker.ready:
            return math.inf
        return worker.begun + self.timeout - time.monotonic()

    def _patience(self) -> float | None:
        """Seconds until the first worker is late; None: that cannot happen."""
        least = min(map(self._left, self.workers))
        return None if least == math.inf else max(least, 0.0)

    def _replace(self, worker: _Worker) -> str:
        worker.connection.close()
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if not worker.ready:
            raise ValueError(
                f"a worker could not be started ({how}): a script that calls this needs `if __name__ == '__main__':`; "
                "or use workers=1"
            )
        self.workers[self.workers.index(worker)] = self._started()
        return how

    def _started(self) -> _Worker:
        # Forked from a server that has imported all this once; elsewhere each imports it, which takes seconds.
        context: Any = get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload([__name__])
        here, there = context.Pipe()
        parts = {name: getattr(self.workplace, name) for name in ("federation", "algorithm", "task", "settings")}
        tensors = {"shared": self.shared, "initial": self.initial}
        arguments = (there, self.model, parts, tensors, self.planned_rounds, self.threads)
        process = context.Process(target=_work, args=arguments, daemon=True)
        try:
            process.start()
        except (OSError, EOFError) as error:
            raise ValueError(f"a worker could not be started ({reason(error)}): use fewer workers") from error
        there.close()  # so that its death is the end of the pipe
        return _Worker(process=process, connection=here)


def _work(
    connection: Connection,
    model: bytes,
    parts: Mapping[str, Any],
    tensors: Mapping[str, Packed],
    planned_rounds: int,
    threads: int,
) -> None:
    """A worker's life: until its pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a scheduler tells all processes: the parent decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    with suppress(EOFError, OSError):
        try:
            workplace = Workplace(model=pickle.loads(model).to(parts["settings"].device), **parts)
            shared, initial = tensors["shared"].tensors(), tensors["initial"].tensors()
            start = ServerState(shared=shared, initial=initial, planned_rounds=planned_rounds)
            answers = _Answers(workplace, start)
            connection.send(_READY)
            while True:
                connection.send(answers.to(connection.recv()))
        except (EOFError, OSError):
            raise
        except Exception as error:
            connection.send(
                _Broke(message=str(error), mistake=isinstance(error, ValueError), trace=traceback.format_exc())
            )


class _Answers:
    """What a worker answers to each order."""

    def __init__(self, workplace: Workplace, start: ServerState) -> None:
        self.workplace, self.clients, self.start = workplace, workplace.clients(), start
        self.slots: dict[int, Packed] = {}

    def to(self, order: _Train | _Evaluate) -> _Trained | Mapping[str, float]:
        """The answer."""
        state = replace(self.start, round=order.round)  # the tensors are the parent's, who has written them
        if isinstance(order, _Evaluate):
            locals = separate_locals(order.locals.tensors())
            return self.workplace.evaluate(state, locals, [order.domain])[order.domain]
        local = None if order.local is None else order.local.tensors()
        update = self.workplace.train(state, self.clients[order.client], local)
        new = None if update.left_out is not None else self._put(tensors_of(update), order.slot)
        return _Trained(update=without_tensors(update), new=new)

    def _put(self, tensors: Mapping[str, Tensor], slot: int) -> Packed | None:
        """Lay the tensors into the slot; the slot, if it had to be made."""
        if slot in self.slots and self.slots[slot].fits(tensors):
            self.slots[slot].write(tensors)
            return None
        self.slots[slot] = Packed.of(tensors).in_shared_memory()
        return self.slots[slot]
