"""A client's machine: it holds one or several clients' images and, on its own disk, the tensors that stay with them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from batchless.federated.config import FederateConfig, FlowerSettings
from batchless.federated.engine import Workplace, torch_threads
from batchless.federated.partition import Client
from batchless.federated.preparation import open_federation, prepare_for
from batchless.federated.server import ServerState
from batchless.federated.update import ClientFailedError, failed
from batchless.federated.wire import Answer, Order, sent_tensors
from batchless.runs import load_checkpoint
from batchless.runs.checkpoint import save_checkpoint


@dataclass(kw_only=True)
class Site:
    """What a client's machine does with the server's orders.

    Attributes:
        clients: the ids of those whose images are here.
        folder: of this machine's disk, where the clients' own tensors are kept.
        root: of the data here; None: where the server says.
        device: cpu or cuda; None: as the server says.
    """

    clients: frozenset[int]
    folder: Path
    root: str | None = None
    device: str | None = None
    _last: tuple[FederateConfig, "_Place"] | None = field(default=None, init=False)

    def expected(self, order: Order) -> ServerState:
        """The state of a run of this order before its first round: what the server's tensors have to look like."""
        return self._place(order.config).fresh

    def train(self, order: Order, state: ServerState) -> Iterator[tuple[int, Answer, Mapping[str, Tensor]]]:
        """Each client of the order, its answer, and its update's tensors as they are sent.

        What stays with the client is on the disk before the answer is given.
        """
        place = self._place(order.config)
        store = LocalStore(folder=self.folder / order.run)
        with torch_threads(order.config.threads):
            for id, since in order.clients.items():
                answer = self._train_one(place, store, order, state, id, since)
                yield id, answer, sent_tensors(answer.update)

    def _train_one(
        self, place: "_Place", store: "LocalStore", order: Order, state: ServerState, id: int, since: int
    ) -> Answer:
        try:
            client = place.client(id)
            local = store.load(id, since, state.initial)
            update = place.workplace.train(state, client, local)
            if id in update.local:
                store.save(id, order.round + 1, update.local[id], earlier=since)
        except ValueError as error:
            return Answer(update=failed(ClientFailedError(id, str(error))))
        return Answer(update=update, began_anew=since > 0 and local is None)

    def evaluate_clients(self, order: Order, state: ServerState) -> dict[int, dict[str, float]]:
        """By client, the figures of its own model."""
        place = self._place(order.config)
        store, workplace = LocalStore(folder=self.folder / order.run), place.workplace
        with torch_threads(order.config.threads):
            figures = {}
            for id, since in order.clients.items():
                local = store.load(id, since, state.initial)
                evaluation = workplace.evaluation(state, {} if local is None else {id: local})
                figures[id] = evaluation.of_client(place.client(id))
            return figures

    def evaluate_domains(self, order: Order, state: ServerState) -> dict[str, dict[str, float]]:
        """By domain, the figures of the global network."""
        with torch_threads(order.config.threads):
            return self._place(order.config).workplace.evaluate(state, {}, order.domains)

    def _place(self, config: FederateConfig) -> "_Place":
        """The network and the images that belong to the clients here; kept for the next order."""
        if self._last is None or self._last[0] != config:
            self._last = config, self._opened(config)
        return self._last[1]

    def _opened(self, config: FederateConfig) -> "_Place":
        data, number = config.data, config.clients_per_domain
        seen = [name for name in data.domains or () if name not in data.unseen_domains]
        pooled = config.algorithm == "centralized"
        if odd := sorted(id for id in self.clients if id >= (1 if pooled else number * len(seen))):
            raise ValueError(
                f"this node is said to host client {odd[0]}, but the run has {number} clients in each of {len(seen)} domains"
            )
        mine = (
            seen if pooled else [name for i, name in enumerate(seen) if any(id // number == i for id in self.clients)]
        )
        own = replace(
            config,
            data=replace(data, root=self.root or data.root, domains=tuple(mine), unseen_domains=()),
            device=self.device or config.device,
            weights=None,  # the server sends them
            flower=FlowerSettings(),
        )
        federation = open_federation(own)
        clients = tuple(
            replace(client, id=seen.index(client.domain) * number + client.id % number) for client in federation.clients
        )
        prepared = prepare_for(own, replace(federation, clients=clients), device=own.device)
        return _Place(workplace=prepared.workplace, fresh=prepared.state)


@dataclass(frozen=True, kw_only=True)
class _Place:
    workplace: Workplace
    fresh: ServerState

    def client(self, id: int) -> Client:
        for client in self.workplace.clients():
            if client.id == id:
                return client
        raise ClientFailedError(id, "is not on this node")


@dataclass(frozen=True, kw_only=True)
class LocalStore:
    """The tensors that stay with clients, by client and round, each a file.

    Attributes:
        folder: of one run.
    """

    folder: Path

    def file(self, client: int, round: int) -> Path:
        """Where a client's tensors lie as that round has left them."""
        return self.folder / f"client{client}-round{round}.pt"

    def load(self, client: int, since: int, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The client's tensors as round `since` has left them; None: it has none, or they are lost.

        ValueError for a file that is damaged or of another network.
        """
        if since == 0 or not (file := self.file(client, since)).exists():
            return None
        local = load_checkpoint(file)
        if {name: value.shape for name, value in local.items()} != {name: value.shape for name, value in like.items()}:
            raise ValueError(f"{file} is of another network")
        return local

    def save(self, client: int, round: int, local: Mapping[str, Tensor], *, earlier: int) -> None:
        """Keep the tensors, and those of round `earlier`: a server that was killed asks for this round again."""
        save_checkpoint(self.file(client, round), local)
        for file in self.folder.glob(f"client{client}-round*.pt"):
            if file not in (self.file(client, round), self.file(client, earlier)):
                file.unlink(missing_ok=True)
