"""What a worker process does, and what it and the engine say to each other."""

import pickle
import signal
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from batchless.federated.engine import Workplace
from batchless.federated.packing import Packed, separate_locals, tensors_of, without_tensors, written
from batchless.federated.server import ServerState
from batchless.federated.update import Update


@dataclass(frozen=True, kw_only=True)
class Train:
    """An order to a worker."""

    position: int
    client: int
    round: int
    slot: int
    local: Packed | None


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """An order to a worker."""

    domain: str
    round: int
    locals: Packed


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A worker's answer: the tensors lie in its slot, which comes along when it is new."""

    update: Update
    new: Packed | None


@dataclass(frozen=True, kw_only=True)
class Broke:
    """A worker's answer: an error that is not a client's."""

    message: str
    mistake: bool
    trace: str


READY = "ready"
"""A worker's first word."""


def work(
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
            connection.send(READY)
            while True:
                connection.send(answers.to(connection.recv()))
        except (EOFError, OSError):
            raise
        except Exception as error:
            connection.send(
                Broke(message=str(error), mistake=isinstance(error, ValueError), trace=traceback.format_exc())
            )


class _Answers:
    """What a worker answers to each order."""

    def __init__(self, workplace: Workplace, start: ServerState) -> None:
        self.workplace, self.clients, self.start = workplace, workplace.clients(), start
        self.slots: dict[int, Mapping[str, Tensor]] = {}

    def to(self, order: Train | Evaluate) -> Trained | Mapping[str, float]:
        """The answer."""
        state = replace(self.start, round=order.round)  # the tensors are the parent's, who has written them
        if isinstance(order, Evaluate):
            locals = separate_locals(order.locals.tensors())
            return self.workplace.evaluate(state, locals, [order.domain])[order.domain]
        local = None if order.local is None else order.local.tensors()
        update = self.workplace.train(state, self.clients[order.client], local)
        new = None if update.left_out is not None else self._put(tensors_of(update), order.slot)
        return Trained(update=without_tensors(update), new=new)

    def _put(self, tensors: Mapping[str, Tensor], slot: int) -> Packed | None:
        """Lay the tensors into the slot; the slot, if it had to be made."""
        if slot in self.slots and written(tensors, self.slots[slot]):
            return None
        new = Packed.of(tensors).in_shared_memory()
        self.slots[slot] = new.tensors()
        return new
