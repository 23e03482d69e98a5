"""Clients trained by processes of this machine, each with one network; tensors travel in shared memory."""

import math
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch import Tensor
from torch.multiprocessing import get_context  # whose pipes send tensors as files of shared memory

from batchless.federated.engine import Figures, Locals, Workplace, needed_locals
from batchless.federated.packing import (
    Packed,
    joined_locals,
    require_shared_memory,
    with_tensors,
)
from batchless.federated.server import ServerState
from batchless.federated.update import ClientFailedError, Update, failed
from batchless.federated.worker_process import READY, Broke, Evaluate, Train, Trained, work
from batchless.runs.atomic import reason

_AHEAD = 3
"""Positions per worker that may be trained before the first of them is summed: a slow client makes the others wait then."""

_QUICK = 0.1
"""Seconds: a worker whose last client took less is given the next order while it trains, so that it need not wait for it."""


@dataclass(frozen=True, kw_only=True)
class _Lost:
    """In place of an answer: the worker is gone, and has been replaced."""

    reason: str
    fix: str


@dataclass(kw_only=True, eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    orders: deque[Train | Evaluate] = field(default_factory=deque)
    begun: float = 0.0
    quick: bool = False
    slots: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    numbers: int = 0
    free: list[int] = field(default_factory=list)

    def take_slot(self) -> int:
        """The number of one that nobody reads; the one used last, whose memory is warm."""
        if not self.free:
            self.free.append(self.numbers)
            self.numbers += 1
        return self.free.pop()

    def takes(self, *, ahead: bool) -> bool:
        """Whether it may have another order; with `ahead` also while it trains, if that will not take long.

        Not if the answer to come brings new memory: if the worker died in the next order, nobody could open it any more.
        """
        if not self.orders:
            return True
        now = self.orders[0]
        return ahead and self.quick and len(self.orders) == 1 and isinstance(now, Train) and now.slot in self.slots

    def answered(self) -> Train | Evaluate:
        """The order that has an answer; the next one, if there is one, is under way."""
        self.begun = time.monotonic()
        return self.orders.popleft()

    def opened(self, answer: Trained, slot: int) -> Update:
        """The update, its values still in the slot."""
        self.quick = answer.update.seconds < _QUICK
        if answer.new is not None:
            self.slots[slot] = answer.new.tensors()
        empty = answer.update.left_out is not None  # a client that failed brings no tensors
        return answer.update if empty else with_tensors(answer.update, self.slots[slot])

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
            while waiting and waiting[0][0] < position + _AHEAD * len(self.workers):
                at, client = waiting[0]
                local = locals.get(client)
                # Not ahead: with tensors the order may be too long for the pipe; the last ones go to whoever is free first.
                worker = self._taker(ahead=local is None and len(waiting) > 2 * len(self.workers))
                if worker is None:
                    break
                waiting.popleft()
                packed, slot = None if local is None else Packed.of(local), worker.take_slot()
                self._give(worker, Train(position=at, client=client, round=state.round, slot=slot, local=packed))
            if position in arrived:
                update, owner, slot = arrived.pop(position)
                yield update
                owner.release(slot)
                position += 1
                continue
            for worker, answer in self._answers():  # then whoever is idle gets work before this one is summed
                order = worker.answered()
                assert isinstance(order, Train)
                if isinstance(answer, Trained):
                    arrived[order.position] = worker.opened(answer, order.slot), worker, order.slot
                else:
                    lost = failed(ClientFailedError(order.client, answer.reason))
                    arrived[order.position] = lost, worker, order.slot
                    waiting.extendleft(
                        (later.position, later.client) for later in reversed(worker.orders) if isinstance(later, Train)
                    )

    def figures(self, state: ServerState, locals: Locals) -> Figures:
        """As `Engine.figures`; each domain is evaluated by one worker."""
        self.shared.write(state.shared)
        federation = self.workplace.federation
        waiting = deque(federation.domains)
        found: dict[str, Mapping[str, float]] = {}
        while len(found) < len(federation.domains):
            while waiting and (worker := self._taker(ahead=False)):
                domain = waiting.popleft()
                packed = Packed.of(joined_locals(needed_locals(federation, locals, domain)))
                self._give(worker, Evaluate(domain=domain, round=state.round, locals=packed))
            for worker, answer in self._answers():
                order = worker.answered()
                assert isinstance(order, Evaluate)
                if isinstance(answer, _Lost):
                    raise ValueError(f"evaluation of {order.domain} failed: {answer.reason}; {answer.fix}")
                found[order.domain] = answer
        return {domain: found[domain] for domain in federation.domains}

    def _taker(self, *, ahead: bool) -> _Worker | None:
        """Who takes the next order: one that has none, or with `ahead` one that will soon have none."""
        fewest_first = sorted(self.workers, key=lambda worker: len(worker.orders))
        return next((worker for worker in fewest_first if worker.takes(ahead=ahead)), None)

    def _give(self, worker: _Worker, order: Train | Evaluate) -> None:
        if not worker.orders:
            worker.begun = time.monotonic()
        worker.orders.append(order)
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
                if worker.orders:
                    yield worker, _Lost(reason=f"its process ended ({how})", fix="use fewer workers")
                continue
            if answer == READY:
                worker.ready, worker.begun = True, time.monotonic()
            elif isinstance(answer, Broke):
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
        if self.timeout is None or not worker.orders or not worker.ready:
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
        process = context.Process(target=work, args=arguments, daemon=True)
        try:
            process.start()
        except (OSError, EOFError) as error:
            raise ValueError(f"a worker could not be started ({reason(error)}): use fewer workers") from error
        there.close()  # so that its death is the end of the pipe
        return _Worker(process=process, connection=here)
