"""What a forward pass keeps for the backward pass, in bytes."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batchless as bl
from batchless.nn import EstimatedBatchNorm


def saved_in_step(model: nn.Module, *inputs: Any, forward: Callable[..., object] = nn.Module.__call__) -> int:
    """`saved_bytes` of a micro-batch inside `batchless.accumulate`, where standardized weights are there already.

    `forward` is called with a copy of the model and the inputs.
    """
    copied = copy.deepcopy(model).train()
    stand_still([copied])
    with bl.standardized(copied):
        return saved_bytes(partial(forward, copied), *inputs)


def stand_still(models: Iterable[nn.Module]) -> None:
    """Let estimates collect instead of moving, as inside `batchless.accumulate`."""
    for model in models:
        for module in model.modules():
            if isinstance(module, EstimatedBatchNorm):
                module.start_collecting()


def saved_bytes(forward: Callable[..., object], *inputs: Any) -> int:
    """Bytes of the distinct storages that a forward pass made and that are still there for the backward pass."""
    with _NewStorages() as made:
        output = forward(*inputs)
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
