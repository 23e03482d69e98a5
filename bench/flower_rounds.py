"""Rounds of federated averaging in Flower's own simulation, as its users write them: a client trains, its parameters are sent.

Needs Flower and ray; the simulation lives in a process of its own, which waits between its turns.
"""

import os
import tempfile
from functools import cache
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing import get_context

from batchless.federated.loopback import OFFLINE
from bench.pure_loops import Batches, pure_loop

_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_CLOSING_SECONDS = 60


def is_installed() -> bool:
    """Whether Flower can simulate here."""
    return find_spec("ray") is not None and find_spec("flwr") is not None


class FlowerSimulation:
    """Flower's simulation of the clients with the given batches, two of them at a time; calling it does one round.

    Args:
        model: all clients' network.
        batches: by client.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="flower-simulation-")
        path = Path(self._folder.name)
        torch.save(model, path / "model.pt")
        for number, own in enumerate(batches):
            # Copies: a batch may be a view of all images, all of which would be written.
            torch.save([(images.clone(), labels.clone()) for images, labels in own], path / f"{number}.pt")
        context: Any = get_context("spawn")
        self._connection, there = context.Pipe()
        arguments = (there, path, len(batches), torch.get_num_threads())
        self._process = context.Process(target=_simulate, args=arguments)

    def __enter__(self) -> "FlowerSimulation":
        self._process.start()
        self._connection.recv()
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.join(_CLOSING_SECONDS)
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def __call__(self) -> None:
        """One round of everybody."""
        self._connection.send(True)
        self._connection.recv()


def _simulate(connection: Connection, folder: Path, clients: int, threads: int) -> None:
    os.environ |= OFFLINE | _RAY
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def trained(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        model, batches = _loaded(folder / "model.pt"), _loaded(folder / f"{context.node_config['partition-id']}.pt")
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        pure_loop(model, [batches])()
        count = sum(len(labels) for _, labels in batches)
        content = RecordDict()
        content["arrays"], content["metrics"] = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": count})
        return Message(content=content, reply_to=message)

    @server_app.main()
    def served(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        arrays: Any = ArrayRecord(_loaded(folder / "model.pt").state_dict())
        number = 0
        connection.send(True)
        while _asked(connection):
            number += 1
            orders = strategy.configure_train(number, arrays, ConfigRecord(), grid)
            arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(orders))
            if arrays is None:
                raise RuntimeError("no client of Flower's simulation has answered as it should: its log says why")
            connection.send(True)

    resources: dict[str, Any] = {"num_cpus": 1.0, "num_gpus": 0.0}
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=clients,
        backend_config={"init_args": {"num_cpus": 2}, "client_resources": resources},
    )


def _asked(connection: Connection) -> bool:
    try:
        return bool(connection.recv())
    except EOFError:
        return False


@cache
def _loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)
