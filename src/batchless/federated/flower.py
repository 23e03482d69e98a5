"""Clients that are elsewhere, reached by Flower: the one file that knows it.

`server_app` and `client_app` are what `flwr run` starts (docs/flower.md); between them travel `batchless.federated.wire`'s
orders and answers and the arrays of the network. What they do is that of any other engine: `FlowerEngine` is the server's
side of a round, `batchless.federated.site` a client's.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from batchless.federated.algorithms import Centralized
from batchless.federated.client_privacy import require_clipped
from batchless.federated.engine import Figures, Locals
from batchless.federated.evaluation import mean_over_clients
from batchless.federated.experiment import resume_federation, run_federation
from batchless.federated.flower_settings import RESUME, config_of, run_name, site_of
from batchless.federated.preparation import Prepared
from batchless.federated.rounds import RoundProgress
from batchless.federated.server import ServerState, require_usable
from batchless.federated.site import Site
from batchless.federated.state import KEPT, kept_elsewhere
from batchless.federated.update import ClientFailedError, Update, failed
from batchless.federated.wire import Answer, Order, figures_text, read_array, read_figures, with_sent

_ROUND, _TEXT, _ERROR, _SHARED, _INITIAL = "round", "text", "error", "shared", "initial"
_POLL = 0.5
"""Seconds from one look for answers to the next."""

_log = logging.getLogger("flwr")


server_app = ServerApp()


@server_app.main()
def _serve(grid: Grid, context: Context) -> None:
    """Run or resume; the run folder is `out`, on this machine."""
    config = config_of(context.run_config)

    def elsewhere(prepared: Prepared) -> "FlowerEngine":
        return FlowerEngine(grid, prepared, name=run_name(config.folder()))

    if context.run_config.get(RESUME):
        resume_federation(
            config.folder(),
            _tell,
            device=config.device if "device" in context.run_config else None,
            root=config.data.root,
            elsewhere=elsewhere,
        )
    else:
        run_federation(config, _tell, on_start=_log.info, elsewhere=elsewhere)


def _tell(progress: RoundProgress) -> None:
    if progress.clients == progress.clients_in_round:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in progress.figures.items())
        _log.info("round %d of %d: %s", progress.round, progress.rounds, figures)


@dataclass(kw_only=True)
class _Nodes:
    """Who hosts which client; nodes come and go."""

    grid: Grid
    order: Order
    hosts: dict[int, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)

    def of(self, clients: Sequence[int], *, seconds: float) -> dict[int, int]:
        """The nodes of the clients that are connected, waiting for the others; not again for one waited for in vain."""
        deadline = time.monotonic() + seconds
        self.known, self.failed = self.known - self.failed, set()  # once more
        while True:
            self._look()
            self.given_up -= self.hosts.keys()
            missing = [id for id in clients if id not in self.hosts and id not in self.given_up]
            if not missing or time.monotonic() > deadline:
                self.given_up.update(missing)
                return {id: self.hosts[id] for id in clients if id in self.hosts}
            time.sleep(_POLL)

    def _look(self) -> None:
        connected = set(self.grid.get_node_ids())
        self.hosts = {client: node for client, node in self.hosts.items() if node in connected}
        new = [node for node in connected - self.known if node not in self.asked.values()]
        self.known &= connected
        messages = [_message(self.order, {}, node, MessageType.QUERY, seconds=3600.0) for node in new]
        self.asked.update((id, node) for id, node in _pushed(self.grid, messages).items() if node in connected)
        for reply in self.grid.pull_messages(list(self.asked)) if self.asked else ():
            node = self.asked.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            self.known.add(node)
            try:
                for client in json.loads(_text(reply, "clients")):
                    if (other := self.hosts.get(client, node)) != node:
                        _log.warning("client %s moves from node %s to %s", client, other, node)
                    self.hosts[int(client)] = node
            except (ValueError, TypeError) as error:
                self.failed.add(node)
                _log.warning("node %s is not used: %s", node, error)


class FlowerEngine:
    """An `Engine` whose clients are trained, and networks evaluated, on the nodes of a Flower grid.

    A node gets one message in a round, with all of its clients. A client whose node is not connected, does not answer in
    time, or sends what cannot be used, is left out of the round.

    Args:
        grid: Flower's.
        prepared: what the run begins with.
        name: of the run on the clients' disks.
    """

    def __init__(self, grid: Grid, prepared: Prepared, *, name: str) -> None:
        self.grid, self.workplace = grid, prepared.workplace
        config, federation = prepared.config, prepared.workplace.federation
        data = replace(config.data, domains=federation.domains, classes=federation.classes)
        self.timeout, self.patience = config.flower.round_timeout, config.flower.connect_timeout
        self.order = Order(run=name, round=0, config=replace(config, data=data))
        self.nodes = _Nodes(grid=grid, order=self.order)

    def updates(self, state: ServerState, chosen: Sequence[int], locals: Locals) -> Iterator[Update]:
        """As `Engine.updates`."""
        hosts = self.nodes.of(chosen, seconds=self.patience)
        since = _since(locals)
        orders = [
            (node, replace(self.order, round=state.round, clients={id: since.get(id, 0) for id in clients}))
            for node, clients in _by_node(hosts).items()
        ]
        replies = self._replies(state, orders, MessageType.TRAIN)
        arrived: dict[int, Message] = {}
        for client in chosen:
            while client in hosts and hosts[client] not in arrived and (new := next(replies, None)) is not None:
                arrived[new[0]] = new[1]
            try:
                if client not in hosts:
                    raise ClientFailedError(client, "no node that hosts it is connected")
                if hosts[client] not in arrived:
                    raise ClientFailedError(client, f"did not answer within {self.timeout:g} seconds")
                yield self._update(arrived[hosts[client]], client, state)
            except ClientFailedError as error:
                _log.warning("round %d: left out %s", state.round + 1, error)
                yield failed(error)

    def _update(self, reply: Message, client: int, state: ServerState) -> Update:
        try:
            domain = self.workplace.clients()[client].domain
            answer = Answer.read(_text(reply, f"answer/{client}"), client=client, domain=domain)
            if answer.update.left_out is not None:
                raise ClientFailedError(client, answer.update.left_out.reason)
            tensors = _tensors(reply, f"update/{client}", state.shared, wider=True)
        except ClientFailedError:
            raise
        except ValueError as error:
            raise ClientFailedError(client, str(error)) from error
        if answer.began_anew:
            _log.warning(
                "round %d: client %d had lost its own layers and began with the initial ones", state.round + 1, client
            )
        update = with_sent(answer.update, tensors)
        require_usable(update, state, client=client)
        privacy = self.order.config.privacy
        if privacy.level == "client":  # the noise hides what lies within the bound, whoever computed it
            require_clipped(update, state, clip_norm=privacy.clip_norm, client=client)
        return replace(update, local={client: kept_elsewhere(state.round + 1)}) if state.initial else update

    def figures(self, state: ServerState, locals: Locals) -> Figures:
        """As `Engine.figures`; domains of which no node answers are missing."""
        federation, clients = self.workplace.federation, self.workplace.clients()
        hosts = self.nodes.of([client.id for client in clients], seconds=self.patience)
        order, since = replace(self.order, round=state.round), _since(locals)
        orders: list[tuple[int, Order]] = []
        for node, own in _by_node(hosts).items() if state.initial else ():
            orders.append((node, replace(order, clients={id: since.get(id, 0) for id in own})))
        for node, domains in _by_node({} if state.initial else self._hosts_of_domains(hosts)).items():
            orders.append((node, replace(order, domains=tuple(domains))))
        found: dict[Any, Mapping[str, float]] = {}
        for node, reply in self._replies(state, orders, MessageType.EVALUATE):
            try:
                sent, asked = read_figures(_text(reply, "figures")), dict(orders)[node]
                found |= {key: sent[key] for key in (*asked.clients, *asked.domains) if key in sent}
            except ValueError as error:
                _log.warning("evaluation after round %d: node %d: %s", state.round, node, error)
        if state.initial:
            of_clients = {
                domain: [found[each.id] for each in clients if each.domain == domain and each.id in found]
                for domain in federation.domains
            }
            found = {domain: mean_over_clients(each) for domain, each in of_clients.items() if each}
        if not found:
            raise ValueError(f"evaluation after round {state.round}: no node has answered; see the log")
        served = {client.domain for client in federation.clients}
        unserved = [domain for domain in federation.domains if domain not in served]
        found |= self.workplace.evaluate(state, {}, unserved)
        return {domain: found[domain] for domain in federation.domains if domain in found}

    def _hosts_of_domains(self, hosts: Mapping[int, int]) -> dict[str, int]:
        """By domain a node that has its images."""
        if isinstance(self.workplace.algorithm, Centralized):
            return dict.fromkeys(self._served(), hosts[0]) if hosts else {}
        clients = self.workplace.clients()
        return {client.domain: hosts[client.id] for client in reversed(clients) if client.id in hosts}

    def _served(self) -> list[str]:
        return list(dict.fromkeys(client.domain for client in self.workplace.federation.clients))

    def _replies(
        self, state: ServerState, orders: Sequence[tuple[int, Order]], kind: str
    ) -> Iterator[tuple[int, Message]]:
        """Send the orders, and give each node with its answer as they come, until the time is over."""
        arrays = {_SHARED: _record(state.shared), _INITIAL: _record(state.initial)}
        messages = [_message(order, arrays, node, kind, seconds=self.timeout) for node, order in orders]
        deadline = time.monotonic() + self.timeout
        waiting = _pushed(self.grid, messages)
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, reply
            if waiting and time.monotonic() > deadline:
                return
            if waiting:
                time.sleep(_POLL)


def _by_node(hosts: Mapping[Any, int]) -> dict[int, list[Any]]:
    """By node, what is on it, in order."""
    return {node: [each for each in sorted(hosts) if hosts[each] == node] for node in sorted(set(hosts.values()))}


def _since(locals: Locals) -> dict[int, int]:
    return {client: int(local[KEPT]) for client, local in locals.items()}


def _record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.contiguous().numpy()) for name, tensor in tensors.items()})


def _message(order: Order, arrays: Mapping[str, ArrayRecord], node: int, kind: str, *, seconds: float) -> Message:
    content = RecordDict({**arrays, _ROUND: ConfigRecord({_TEXT: order.text()})})
    return Message(content, node, kind, ttl=max(seconds, 1.0), group_id=str(order.round + 1))


def _pushed(grid: Grid, messages: Sequence[Message]) -> dict[str, int]:
    """By message, its node; one that could not be sent is missing."""
    sent: dict[str, int] = {}
    for message in messages:  # one by one: together they could be too large
        sent.update((id, message.metadata.dst_node_id) for id in grid.push_messages([message]) if id)
    return sent


def _text(message: Message, name: str) -> str:
    """A text of a message; ValueError with what its sender says went wrong, or if there is none."""
    if message.has_error():
        raise ValueError(f"its node reports: {' '.join(str(message.error.reason).split())[:500]}")
    record = message.content.get(name)
    error = message.content.get(_ERROR)
    text = record.get(_TEXT) if isinstance(record, ConfigRecord) else None
    if isinstance(error, ConfigRecord):
        raise ValueError(" ".join(str(error.get(_TEXT)).split())[:500])
    if not isinstance(text, str):
        raise ValueError(f"sent a message without {name}")
    return text


def _tensors(message: Message, name: str, like: Mapping[str, Tensor], *, wider: bool = False) -> dict[str, Tensor]:
    """The arrays of a record of a message, each with the shape and type of its name in `like`; ValueError otherwise."""
    record = message.content.get(name)
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"sent a message without {name}")
    if odd := sorted(record.keys() ^ like.keys()):
        raise ValueError(f"sent {'no ' if odd[0] in like else ''}{odd[0][:100]}: is its network the server's?")
    return {key: read_array(record[key].data, name=key, like=value, wider=wider) for key, value in like.items()}


def make_client_app() -> ClientApp:
    """A client app that keeps network and images from one message to the next, where its process lives on."""
    app, sites = ClientApp(), {}

    def site(context: Context) -> Site:
        key = tuple(sorted(context.node_config.items()))
        if key not in sites:
            sites[key] = site_of(context.node_config)
        return sites[key]

    def ordered(message: Message, site: Site) -> tuple[Order, ServerState]:
        order = Order.read(_text(message, _ROUND))
        fresh = site.expected(order)
        shared, initial = _tensors(message, _SHARED, fresh.shared), _tensors(message, _INITIAL, fresh.initial)
        return order, replace(fresh, shared=shared, initial=initial, round=order.round)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _answer(message, lambda: _texts({"clients": json.dumps(sorted(site(context).clients))}))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def answer() -> RecordDict:
            order, state = ordered(message, site(context))
            content = RecordDict()
            for client, told, values in site(context).train(order, state):
                content[f"answer/{client}"] = ConfigRecord({_TEXT: told.text()})
                content[f"update/{client}"] = _record(values)
            return content

        return _answer(message, answer)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def answer() -> RecordDict:
            order, state = ordered(message, site(context))
            of_clients = site(context).evaluate_clients(order, state)
            return _texts({"figures": figures_text({**of_clients, **site(context).evaluate_domains(order, state)})})

        return _answer(message, answer)

    return app


def _texts(texts: Mapping[str, str]) -> RecordDict:
    return RecordDict({name: ConfigRecord({_TEXT: text}) for name, text in texts.items()})


def _answer(message: Message, make: Any) -> Message:
    """The reply; what went wrong here is told, as Flower itself would not."""
    try:
        content = make()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        _log.exception("the order could not be carried out")
        content = RecordDict({_ERROR: ConfigRecord({_TEXT: f"{type(error).__name__}: {error}"})})
    return Message(content, reply_to=message)


client_app = make_client_app()
