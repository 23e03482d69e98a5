"""The rounds: who trains where, and the sum that comes out the same wherever that is.

An engine yields what the clients of a round bring, in the order of their positions; this process (`LocalEngine`), processes
that it starts (`batchless.federated.workers`), or those of torchrun (`batchless.federated.ranks`) train them. The sum is
taken here, in blocks of 8 positions, as the values come: in memory there are a few updates, however many clients there are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from batchless.federated.algorithms import Algorithm
from batchless.federated.client import ClientSettings, participants, train_client
from batchless.federated.client_privacy import ClientNoise
from batchless.federated.evaluation import Evaluation
from batchless.federated.partition import Client, Federation
from batchless.federated.server import ServerState, aggregate
from batchless.federated.sharing import tensor_kinds, trainable_tensors
from batchless.federated.summing import RoundSum, SumMemory, sum_in_blocks
from batchless.federated.update import ClientFailedError, Update, failed
from batchless.tasks.classify import Batch
from batchless.train import Task
from batchless.train.interrupt import ShouldStop, TrainingStoppedError

Locals = Mapping[int, Mapping[str, Tensor]]
"""By client, the tensors that stay with it."""

Figures = Mapping[str, Mapping[str, float]]
"""By domain and name."""

OnClient = Callable[[int, int], None]
"""`on_client(done, of)`: called after each client of a round, failed ones too."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What each process that trains clients has.

    Attributes:
        model: the one network in this process, whose tensors are overwritten.
        federation: all clients and tests.
        algorithm: what is shared.
        task: what is learned.
        settings: how clients train.
        memory: of the sums of the last round, in the process that sums.
    """

    model: nn.Module
    federation: Federation
    algorithm: Algorithm
    task: Task[Batch]
    settings: ClientSettings
    memory: SumMemory = field(default_factory=SumMemory, init=False, repr=False)

    def clients(self) -> tuple[Client, ...]:
        """Those that train, by id."""
        return participants(self.federation, self.algorithm)

    def train(self, state: ServerState, client: Client, local: Mapping[str, Tensor] | None) -> Update:
        """What the client brings; an update that says why, if it cannot be used. Its values are valid until the next call."""
        told = self.algorithm, self.task, self.settings
        try:
            return train_client(self.model, state, client, *told, local=local)
        except ClientFailedError as error:
            return failed(error)

    def evaluate(self, state: ServerState, locals: Locals, domains: Sequence[str]) -> dict[str, dict[str, float]]:
        """The figures of some domains."""
        return self.evaluation(state, locals).of_domains(domains)

    def evaluation(self, state: ServerState, locals: Locals) -> Evaluation:
        """Of the networks after a round, in the one network of this process."""
        return Evaluation(
            model=self.model,
            state=state,
            locals=locals,
            federation=self.federation,
            algorithm=self.algorithm,
            task=self.task,
            settings=self.settings,
        )


class Engine(Protocol):
    """Where clients are trained and networks evaluated."""

    def updates(self, state: ServerState, chosen: Sequence[int], locals: Locals) -> Iterator[Update]:
        """What the clients `chosen` bring, in this order; the values in an update are valid until the next one is asked for."""

    def figures(self, state: ServerState, locals: Locals) -> Figures:
        """Of every domain."""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch computes with so many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def needed_locals(federation: Federation, locals: Locals, domain: str) -> Locals:
    """Those of `locals` that the evaluation of a domain reads: all, where a model has to be made of other clients'."""
    own = [client.id for client in federation.clients if domain in client.domains]
    return {client: locals[client] for client in own} if own and locals.keys() >= set(own) else locals


@dataclass(frozen=True, kw_only=True)
class LocalEngine:
    """One client after the other, in this process.

    Attributes:
        workplace: this process.
    """

    workplace: Workplace

    def updates(self, state: ServerState, chosen: Sequence[int], locals: Locals) -> Iterator[Update]:
        """As `Engine.updates`."""
        clients = self.workplace.clients()
        for client in chosen:
            yield self.workplace.train(state, clients[client], locals.get(client))

    def figures(self, state: ServerState, locals: Locals) -> Figures:
        """As `Engine.figures`."""
        return self.workplace.evaluate(state, locals, self.workplace.federation.domains)


def run_round(
    engine: Engine,
    workplace: Workplace,
    state: ServerState,
    chosen: Sequence[int],
    locals: Locals,
    *,
    min_clients: int,
    should_stop: ShouldStop,
    on_client: OnClient,
    noise: ClientNoise | None = None,
) -> tuple[ServerState, RoundSum]:
    """One round: the next state, and the sum of what the clients have brought.

    Args:
        engine: where they train.
        workplace: of this process.
        state: before the round.
        chosen: the ids of the round's clients, rising.
        locals: of clients that have some already.
        min_clients: as many must not fail.
        should_stop: asked after each client.
        on_client: called after each client.
        noise: what the server adds, to hide which clients took part; then nobody, or fewer than `min_clients`, may be chosen.

    Raises:
        ValueError: too few clients are left.
        TrainingStoppedError: `should_stop()` became true; the round is lost.
    """

    def watched() -> Iterator[Update]:
        for done, update in enumerate(engine.updates(state, chosen, locals), start=1):
            on_client(done, len(chosen))
            yield update
            if done < len(chosen) and should_stop():
                raise TrainingStoppedError(0)

    update = sum_in_blocks(watched(), memory=workplace.memory)
    left = len(chosen) - len(update.left_out)
    if left < (min_clients if noise is None else min(min_clients, len(chosen))):
        reasons = "; ".join(f"client {each.client}: {each.reason}" for each in update.left_out[:3])
        more = "; .." if len(update.left_out) > 3 else ""
        raise ValueError(
            f"round {state.round + 1}: {left} of {len(chosen)} clients left, min_clients is {min_clients} ({reasons}{more})"
        )
    kinds, trainable = tensor_kinds(workplace.model), trainable_tensors(workplace.model)
    means = None if noise is None else noise.mean(update, state)
    return aggregate(update, state, workplace.algorithm, kinds, trainable, means=means), update
