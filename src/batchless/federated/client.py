"""The client's side of a round: local training on the one network of this process."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from batchless.data import Augment, ChannelStatistics, ImageDataset, PooledImages
from batchless.data.seeding import seed_torch
from batchless.federated.algorithms import Algorithm, Centralized, FedProx, FixBN
from batchless.federated.client_privacy import clipped
from batchless.federated.partition import Client, Federation
from batchless.federated.privacy import PrivacySettings
from batchless.federated.sample_privacy import drawn_steps, noised, per_image_gradients
from batchless.federated.server import ServerState, require_usable
from batchless.federated.update import ClientFailedError, Update
from batchless.nn.batch_norm import BatchNorm
from batchless.surgery.recognize import is_normalization
from batchless.tasks.classify import Batch, ImageData
from batchless.train import Accumulation, Clip, OptimizerSettings, Task

CLIENT_OPTIMIZER = OptimizerSettings(
    learning_rate=0.01, momentum=0.0, nesterov=False, weight_decay=0.0, warmup=0.0, schedule="constant"
)
"""Plain SGD at a constant rate, as FedBN's and FedWon's clients have it."""

NO_PRIVACY = PrivacySettings()


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """How every client trains.

    Attributes:
        images_per_forward: the micro-batch.
        images_per_step: what one optimizer step sees, a multiple of `images_per_forward`; the last step of an epoch sees
            what is left of it.
        local_epochs: over the client's images in a round.
        optimizer: made anew in each round; its schedule goes over all planned rounds.
        image_size: S, the square that the network sees.
        augment: what happens at random to a training image; None: nothing.
        statistics: by which images are normalized.
        seed: of everything random.
        device: where the network lives.
        privacy: what no image, or no client, is to be told by.
    """

    images_per_forward: int
    images_per_step: int
    local_epochs: int = 1
    optimizer: OptimizerSettings = CLIENT_OPTIMIZER
    image_size: int
    augment: Augment | None = None
    statistics: ChannelStatistics
    seed: int = 0
    device: str = "cpu"
    privacy: PrivacySettings = NO_PRIVACY

    def __post_init__(self) -> None:
        for name in ("images_per_forward", "images_per_step", "local_epochs", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.images_per_step % self.images_per_forward:
            raise ValueError(
                f"images_per_step={self.images_per_step} must be a multiple of images_per_forward={self.images_per_forward}"
            )

    def data(self, images: ImageDataset, *, seed: int) -> ImageData:
        """Batches of images as the network sees them; `seed` is of their order and augmentation."""
        return ImageData(
            train_images=images,
            test_images=images,
            image_size=self.image_size,
            augment=self.augment,
            statistics=self.statistics,
            seed=seed,
        )


def participants(federation: Federation, algorithm: Algorithm) -> tuple[Client, ...]:
    """The clients that train: those of the federation, or for `Centralized` one that has all their images."""
    if not isinstance(algorithm, Centralized):
        return federation.clients
    images = PooledImages(parts=tuple(client.train for client in federation.clients))
    return (Client(id=0, domain="all", train=images),)


def load_state(model: nn.Module, state: ServerState, local: Mapping[str, Tensor] | None) -> None:
    """Give `model` the server's tensors and a client's own; None: the initial ones, of a client that has none yet."""
    given = {**state.initial, **state.shared, **(local or {})}
    own = model.state_dict()
    if own.keys() != given.keys() or any(given[name].shape != tensor.shape for name, tensor in own.items()):
        model.load_state_dict(given)  # which says what does not fit
    # One call for all: `load_state_dict` walks over the modules, which takes as long as a step of a small network.
    torch._foreach_copy_(list(own.values()), [given[name] for name in own])


def train_client(
    model: nn.Module,
    state: ServerState,
    client: Client,
    algorithm: Algorithm,
    task: Task[Batch],
    settings: ClientSettings,
    *,
    local: Mapping[str, Tensor] | None,
) -> Update:
    """Train the client's network for one round and return what it brings to it.

    A function of its arguments but `model`, whose tensors are overwritten; on the CPU they are the update's values. Every
    random number comes from (seed, round, client). No step crosses epochs. A single last image joins the images before it
    where a forward sees more than one, since batch statistics have nothing to say about one image. With `settings.privacy`
    the update is clipped (`client`), or every step is one of DP-SGD (`sample`).

    Args:
        model: the one network of this process, on `settings.device`.
        state: before the round.
        client: who trains.
        algorithm: what is shared, and what is added to the loss.
        task: whose loss.
        settings: how.
        local: the client's own tensors from its last round; None: its first.

    Raises:
        ClientFailedError: an image cannot be read, the network cannot be trained on so few, or a result is NaN or infinite.
        ValueError: statistics over all processes, each of which trains another client.
    """
    _require_own_statistics(model)
    began = time.perf_counter()
    load_state(model, state, local)
    try:
        with per_image_gradients(model) if settings.privacy.level == "sample" else nullcontext():
            loss, count, images = _train(model, state, client, algorithm, task, settings)
    except ValueError as error:
        raise ClientFailedError(client.id, str(error)) from error
    seconds = time.perf_counter() - began
    weight = 1.0 if algorithm.weighting == "equal" else float(len(client.train))
    update = _update(model, state, client, weight=weight, loss=(loss, count), images=images, seconds=seconds)
    if settings.privacy.level == "client":
        update = clipped(update, state, clip_norm=settings.privacy.clip_norm, client=client.id)
    require_usable(update, state, client=client.id)
    return update


def _train(
    model: nn.Module,
    state: ServerState,
    client: Client,
    algorithm: Algorithm,
    task: Task[Batch],
    settings: ClientSettings,
) -> tuple[float, float, int]:
    """Sum of the loss, of how many samples, and images seen."""
    seed = Random(f"client/{settings.seed}/{state.round}/{client.id}").getrandbits(63)
    data = settings.data(client.train, seed=seed)
    frozen = isinstance(algorithm, FixBN) and algorithm.frozen(state.round, planned_rounds=state.planned_rounds)
    training_mode(model, frozen_statistics=frozen)
    optimizer = settings.optimizer.build(model)
    clip = settings.optimizer.clip()
    if isinstance(algorithm, FedProx) and algorithm.mu > 0:
        clip = ProximalGradient(mu=algorithm.mu, model=model, clip=clip)
    step_named = _step_maker(model, optimizer, clip, settings)
    losses = []
    samples: int | Tensor = 0
    seen = 0
    words = (state.round, client.id)
    for planned in _steps(data, settings, words=words):
        share = (state.round + planned.done) / state.planned_rounds
        for group in optimizer.param_groups:
            group["lr"] = settings.optimizer.learning_rate_at(share, images_per_step=settings.images_per_step)
        # What the model itself draws; `seed` is drawn from a string already, which takes as long as a layer.
        seed_torch((seed + seen) % 2**63, settings.device)
        with step_named((*words, planned.epoch, planned.number)) as step:
            for prepared in planned.batches:
                batch = task.to(prepared, settings.device)
                loss, count = task.loss(model, batch)
                step.backward_sum(loss, samples=count, images=task.images(batch))
                losses.append(loss.detach())
                samples = samples + count
        seen += planned.images
    total = float(torch.stack(losses).sum(dtype=torch.float64)) if losses else 0.0
    if not math.isfinite(total):
        raise ValueError("the loss became NaN or infinite: lower the learning rate, or clip (adaptive_clipping=0.1)")
    return total, float(samples), seen


@dataclass(frozen=True, kw_only=True)
class _Step:
    """An optimizer step to be taken: how many images, their micro-batches, and the share of the round done in its middle."""

    epoch: int
    number: int
    images: int
    batches: Iterator[Batch]
    done: float


def _steps(data: ImageData, settings: ClientSettings, *, words: Sequence[object]) -> Iterator[_Step]:
    """The steps of a client's round, one after the other."""
    seen, all_images = 0, len(data.train_images) * settings.local_epochs
    for epoch in range(settings.local_epochs):
        steps = _micro_batches(data, epoch, settings, words=words)
        batches = iter(data.train(epoch, [part for step in steps for part in step]))
        for number, parts in enumerate(steps):
            images = sum(map(len, parts))
            if settings.privacy.level == "sample":
                # How many images come by is random, how many steps there are is not.
                done = (epoch + (number + 0.5) / len(steps)) / settings.local_epochs
            else:
                done = (seen + images / 2) / all_images
            yield _Step(epoch=epoch, number=number, images=images, batches=islice(batches, len(parts)), done=done)
            seen += images


def _step_maker(
    model: nn.Module, optimizer: Optimizer, clip: Clip | None, settings: ClientSettings
) -> Callable[[Sequence[object]], AbstractContextManager[Any]]:
    """A function that from words which name an optimizer step makes its context, whose value has `backward`."""
    if settings.privacy.level != "sample":
        # The next client's state is loaded into whatever an exception leaves.
        accumulation = Accumulation(model, optimizer, clip=clip, process_group=None, keep_buffers=False)
        return lambda words: accumulation.step()
    return lambda words: noised(
        model,
        optimizer,
        settings.privacy,
        images_per_step=settings.images_per_step,
        clip=clip,
        words=words,
        seed=settings.seed,
    )


def _micro_batches(
    data: ImageData, epoch: int, settings: ClientSettings, *, words: Sequence[object]
) -> list[list[Sequence[int]]]:
    """The micro-batches of each step of an epoch."""
    steps: Iterable[Sequence[int]]
    if settings.privacy.level == "sample":
        steps = drawn_steps(
            settings.privacy,
            len(data.train_images),
            images_per_step=settings.images_per_step,
            words=(*words, epoch),
            seed=settings.seed,
        )
    else:
        steps = _pieces(data.order(epoch), settings.images_per_step)
    return [list(_pieces(step, settings.images_per_forward)) for step in steps]


def _pieces(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive pieces of `size`, the last one shorter; a single last item joins the piece before.

    >>> list(_pieces([0, 1, 2, 3, 4], 2)), list(_pieces([0, 1], 1)), list(_pieces([0], 2))
    ([[0, 1], [2, 3, 4]], [[0], [1]], [[0]])
    """
    begin = 0
    while begin < len(items):
        end = min(begin + size, len(items))
        if size > 1 and len(items) - end == 1:
            end += 1
        yield items[begin:end]
        begin = end


def training_mode(model: nn.Module, *, frozen_statistics: bool) -> None:
    """Training mode; with `frozen_statistics` the normalization modules alone normalize by their running statistics."""
    model.train()
    if frozen_statistics:
        for module in model.modules():
            if is_normalization(module):
                module.training = False  # not eval(): what they contain (dropout in timm's layers) goes on training


class ProximalGradient:
    """A clip that first adds FedProx's gradient: `mu (w - w_t)`, of `mu/2 * sum ||w - w_t||^2`, w_t as it is now.

    Once per optimizer step and exact, whatever the number of micro-batches. A parameter without gradient has not moved.
    """

    def __init__(self, *, mu: float, model: nn.Module, clip: Clip | None) -> None:
        self.mu, self.clip = mu, clip
        self.start = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """Add to the gradients of `model`, then clip them."""
        for parameter, start in self.start:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.mu)
        if self.clip is not None:
            self.clip(model)


def _require_own_statistics(model: nn.Module) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) or (isinstance(module, BatchNorm) and module.sync):
            raise ValueError(
                f"{name} takes its statistics over all processes, which train different clients: choose bn instead of "
                "sync-bn, bcn without sync"
            )


@torch.no_grad()
def _update(
    model: nn.Module,
    state: ServerState,
    client: Client,
    *,
    weight: float,
    loss: tuple[float, float],
    images: int,
    seconds: float,
) -> Update:
    values, counters, local = {}, {}, {}
    for name, tensor in model.state_dict().items():  # detached
        # The state was divided by `tensor_kinds`, which takes as long as a step of a small network.
        if name in state.initial:
            local[name] = tensor.cpu().clone()
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            counters[name] = tensor.cpu().clone()
        else:
            values[name] = tensor.cpu()
    return Update(
        weight=weight,
        values=values,
        counters=counters,
        local={client.id: local} if local else {},
        metrics={client.domain: {"loss": loss}},
        images=images,
        seconds=seconds,
    )
