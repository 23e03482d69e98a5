"""What a forward pass keeps for the backward pass, and what a run has in memory at most, in bytes."""

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
    alive = made.alive()
    del output
    return alive


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes of the distinct storages that the operators of a run made and that were there at one time, at most."""
    with _NewStorages(watch=True) as made:
        run()
    return made.most


class _NewStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that an operator makes; dead ones may leave their address to another.

    `alive()` is the bytes of those that are there; `most` what that was at most, if it is to `watch` after each operator.
    """

    def __init__(self, *, watch: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.watch, self.most = watch, 0

    def alive(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.values() if not storage.expired())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in taken:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self.watch:
            self.most = max(self.most, self.alive())
        return result
