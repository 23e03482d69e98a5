"""What rounds of federated averaging are made of: forward, backward and step, and nothing else, here or in other processes."""

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.optim import SGD

from bench.timing import Contestant

RATE = 1e-4
"""So small that all rounds do the same arithmetic."""

Batches = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""By client, its batches of a round."""


def pure_loop(model: nn.Module, batches: Batches) -> Contestant:
    """Forward, backward, step, with an optimizer for each client."""

    def run() -> None:
        for own in batches:
            optimizer = SGD(model.parameters(), lr=RATE)
            for images, labels in own:
                torch.autograd.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()

    return run


class PureProcess:
    """A pure loop in a process of its own, which waits between its turns."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        context: Any = get_context("spawn")
        self.connection, there = context.Pipe()
        arguments = (there, model, batches, torch.get_num_threads())
        self.process = context.Process(target=_turns, args=arguments, daemon=True)

    def __enter__(self) -> "PureProcess":
        self.process.start()
        self.connection.recv()
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def run_together(processes: Sequence[PureProcess]) -> None:
    """One turn of each, at the same time."""
    for each in processes:
        each.connection.send(True)
    for each in processes:
        each.connection.recv()


def _turns(connection: Connection, model: nn.Module, batches: Batches, threads: int) -> None:
    torch.set_num_threads(threads)
    # Copies: what comes from another process lies in shared memory, which the engine's batches do not.
    own = [[(images.clone(), labels.clone()) for images, labels in client] for client in batches]
    network = own_memory(model)
    run = pure_loop(network, own)
    connection.send(True)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        run()
        connection.send(True)


def own_memory(model: nn.Module) -> nn.Module:
    """The network with parameters of this process's own memory."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in list(store.items()):
                if value is not None:
                    copy = value.detach().clone()
                    store[name] = nn.Parameter(copy) if isinstance(value, nn.Parameter) else copy
    return model
