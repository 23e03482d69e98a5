"""A federation of seconds: random images of three classes in two domains, and networks that train on them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import batchless as bl
from batchless.data import ChannelStatistics
from batchless.data.memory import TensorImages
from batchless.federated.algorithms import Algorithm
from batchless.federated.client import CLIENT_OPTIMIZER, ClientSettings, train_client
from batchless.federated.partition import Client, Federation
from batchless.federated.server import ServerState, aggregate, initial_state
from batchless.federated.sharing import tensor_kinds, trainable_tensors
from batchless.federated.summing import RoundSum, sum_in_blocks
from batchless.tasks import Classify
from batchless.train import OptimizerSettings

CLASSES = ("a", "b", "c")
SIZE = 6
STATISTICS = ChannelStatistics(mean=(0.5, 0.4, 0.3), std=(0.3, 0.3, 0.2))


def images(count: int, *, seed: int, darkest: int = 0) -> TensorImages:
    """Random images; `darkest` moves their colours, as a domain does."""
    generator = torch.Generator().manual_seed(seed)
    return TensorImages(
        images=torch.randint(darkest, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        labels=tuple(torch.randint(len(CLASSES), (count,), generator=generator).tolist()),
        classes=CLASSES,
        origins=((f"noise {seed}", count),),
    )


def client(id: int, count: int = 6, *, domain: str = "dark", validation: int = 0) -> Client:
    darkest = 0 if domain == "dark" else 128
    return Client(
        id=id,
        domain=domain,
        train=images(count, seed=id, darkest=darkest),
        validation=images(validation, seed=100 + id, darkest=darkest) if validation else None,
    )


def federation(*clients: Client, unseen: tuple[str, ...] = ()) -> Federation:
    domains = (*dict.fromkeys(one.domain for one in clients), *unseen)
    tests = {name: images(10 + i, seed=200 + i, darkest=64 * i) for i, name in enumerate(domains)}
    return Federation(clients=clients, tests=tests, domains=domains, classes=CLASSES, record={})


def network(normalizer: str = "bn", *, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    return bl.convert(model, normalizer, example=torch.zeros(1, 3, SIZE, SIZE))[0]


def settings(**changes: Any) -> ClientSettings:
    optimizer = changes.pop("optimizer", OptimizerSettings(**{**vars(CLIENT_OPTIMIZER), "learning_rate": 0.05}))
    values = {"images_per_forward": 2, "images_per_step": 4, "image_size": SIZE, "statistics": STATISTICS} | changes
    return ClientSettings(optimizer=optimizer, **values)


@dataclass(kw_only=True)
class Double(Classify):
    """Classification in float64, for comparisons to nine digits."""

    def to(self, batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
        return batch[0].double(), batch[1]


def rounds(
    algorithm: Algorithm,
    model: nn.Module,
    clients: tuple[Client, ...],
    number: int,
    *,
    planned: int = 4,
    **changes: Any,
) -> tuple[ServerState, dict[int, Any]]:
    """Some rounds of everyone, and the clients' local tensors."""
    task = changes.pop("task", Classify())
    state, locals = initial_state(model, algorithm, planned), {}
    for _ in range(number):
        update = one_round(algorithm, model, clients, state, locals, task=task, **changes)
        locals |= update.local
        state = aggregate(update, state, algorithm, tensor_kinds(model), trainable_tensors(model))
    return state, locals


def one_round(
    algorithm: Algorithm,
    model: nn.Module,
    clients: tuple[Client, ...],
    state: ServerState,
    locals: dict[int, Any],
    *,
    task: Classify | None = None,
    **changes: Any,
) -> RoundSum:
    made = settings(**changes)
    task = Classify() if task is None else task
    return sum_in_blocks(
        train_client(model, state, one, algorithm, task, made, local=locals.get(one.id)) for one in clients
    )


def same_bits(left: Any, right: Any) -> bool:
    """Whether two mappings of tensors are equal in names, types and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
