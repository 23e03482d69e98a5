"""Flower's server app and client app in one process: a grid that hands each message to the client app at once."""

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from domain_runs import result
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from batchless.federated import FederateConfig
from batchless.federated.flower import make_client_app, server_app
from batchless.federated.flower_settings import RESUME, run_config_of
from batchless.federated.state import KEPT
from batchless.runs import load_checkpoint


class InProcessGrid(Grid):
    """Each node is a client app with its own configuration; `change` may spoil a reply, None: it never comes."""

    def __init__(
        self,
        nodes: dict[int, dict[str, Any]],
        *,
        change: Callable[[Message, Message], Message | None] = lambda message, reply: reply,
    ) -> None:
        self.nodes, self.change = nodes, change
        self.app: ClientApp = make_client_app()
        self.numbers = count(1)
        self.replies: dict[str, Message] = {}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *given: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            id = str(next(self.numbers))
            message.metadata.__dict__["_message_id"] = id
            node = message.metadata.dst_node_id
            context = Context(run_id=1, node_id=node, node_config=self.nodes[node], state=RecordDict(), run_config={})
            reply = self.change(message, self.app(message, context))
            if reply is not None:
                self.replies[id] = reply
            ids.append(id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(id) for id in list(message_ids) if id in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


def sites(folder: Path, *, clients: int, nodes: int = 2) -> dict[int, dict[str, Any]]:
    """By node its configuration, the clients dealt out in turn."""
    return {
        100 + node: {
            "partition-id": ",".join(map(str, range(node, clients, nodes))),
            "state-folder": str(folder / f"node{node}"),
        }
        for node in range(min(nodes, clients))
    }


def serve(config: FederateConfig, grid: Grid, *, resume: bool = False) -> None:
    """What the server's process does in a run of that configuration."""
    run_config = run_config_of(config) | {RESUME: resume}
    server_app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config))


def comparable(run: Path, disks: Path | None = None) -> dict[str, Any]:
    """As `result`; what stays with clients is taken from their disks, and is left out of the network of nobody."""
    found = result(run)
    initial = {name.rpartition("/")[2] for name in found if name.startswith("/checkpoint/training/initial/")}
    found = {name: value for name, value in found.items() if name.removeprefix("/checkpoint/model/") not in initial}
    for name in [name for name in found if name.endswith(KEPT)]:
        client, round = int(name.split("/")[3]), int(found.pop(name))
        assert disks is not None
        (file,) = disks.glob(f"**/client{client}-round{round}.pt")
        found |= {f"/checkpoint/locals/{client}/{key}": value for key, value in load_checkpoint(file).items()}
    return found
