"""Activation memory against time on ResNet-50 with one 224 px image: `batchless.lean` and block checkpointing."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

import batchless as bl
from bench.timing import Clock, Comparison, Contestant, Target, interleave

REPEATS = 10
IMAGE_SIZE = 224
NORMALIZERS = ("bn", "bcn-micro+ws")

TARGETS = (
    Target(of="lean 1", base="plain", at_most=1.05),
    Target(of="lean 2", base="plain", at_most=1.15),
    Target(of="lean 3", base="checkpoint per block", at_most=1.0),
)


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """Forward and backward, BatchNorm and micro-batch BCN, at every level and checkpointed."""
    image, target = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(1000, (1,))
    for normalizer in NORMALIZERS:
        torch.manual_seed(seed)
        model, _ = bl.convert(torchvision.models.resnet50(), normalizer, example=image)
        models = contestants(model.train())
        with bl.standardized(
            model
        ):  # so that no contestant's bytes hold standardized weights: they are not activations
            share_weights(model, models)
            saved = {name: saved_bytes(contestant, image) for name, contestant in models.items()}
            steps = {name: forward_backward(contestant, image, target) for name, contestant in models.items()}
            times = interleave(steps, repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round)
            share_weights(None, models)
        title = f"ResNet-50 {normalizer}, forward and backward of one {IMAGE_SIZE} px image"
        yield Comparison(title=title, base="plain", times=times, targets=TARGETS, saved_bytes=saved)


def contestants(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of `model`: as it is, at every lean level, and with a checkpoint around each bottleneck."""
    checkpointed = copy.deepcopy(model)
    for module in checkpointed.modules():
        if isinstance(module, Bottleneck):
            run: Any = functools.partial(checkpoint, module.forward, use_reentrant=False)
            module.forward = run  # type: ignore[method-assign]
    lean = {f"lean {level}": bl.lean(model, level)[0] for level in (1, 2, 3)}
    return {"plain": model, **lean, "checkpoint per block": checkpointed}


def share_weights(model: nn.Module | None, models: dict[str, nn.Module]) -> None:
    """Let all models compute with the standardized weights that `model` holds; None: with their own again."""
    for other in models.values():
        if other is model:
            continue
        for name, module in other.named_modules():
            if hasattr(module, "shared_weight"):
                source: Any = None if model is None else model.get_submodule(name)
                module.shared_weight = None if source is None else source.shared_weight


def forward_backward(model: nn.Module, image: Tensor, target: Tensor) -> Contestant:
    """One forward and backward pass; gradients are dropped."""

    def run() -> None:
        torch.autograd.backward(F.cross_entropy(model(image), target))
        model.zero_grad()

    return run


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes of the distinct storages that a forward pass made and that are still there for the backward pass."""
    with _NewStorages() as made:
        output = model(*inputs)
    alive = sum(nbytes for storage, nbytes in made.storages.values() if not storage.expired())
    del output
    return alive


class _NewStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that an operator makes; dead ones may leave their address to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in taken:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result
