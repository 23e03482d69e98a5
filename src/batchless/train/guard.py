"""What an optimizer step promises of the model around it: checked before, put back after a failure, clean at the end."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchless.nn.reparameterized import Reparameterized

_MARK = "_batchless_step_in_progress"
"""Attribute that every module of a model has while a step is in progress on it."""


class Guard:
    """Refuses a model that is not ready for a step; after an exception, puts its buffers back; leaves gradients None.

    Args:
        model: to be stepped, not wrapped by `torch.compile`.
        optimizer: that steps it.
        modules: all of the model, itself included.
        parameters: all of the model.
        keep_buffers: whether buffers are put back.

    Raises:
        ValueError: a wrapped model, one with a step in progress, or an optimizer of other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        keep_buffers: bool,
    ) -> None:
        self._model, self._parameters = model, parameters
        # By a dict an attribute is had without torch's looking through parameters, buffers and modules first.
        self._attributes = [vars(module) for module in modules]
        self._reparameterized = [module for module in modules if isinstance(module, Reparameterized)]
        _require_bare(model)
        self._require_outside()
        _require_own(optimizer, parameters)
        self._before = BufferCopies(modules if keep_buffers else ())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step; ValueError if one is in progress already, or gradients are there."""
        self._require_outside()
        self._require_no_gradients()
        self._before.take()
        for attributes in self._attributes:
            attributes[_MARK] = True
        try:
            yield
        except BaseException:
            self._before.put_back()
            raise
        finally:
            for attributes in self._attributes:
                del attributes[_MARK]
            for parameter in self._parameters:
                parameter.grad = None

    def _require_outside(self) -> None:
        inside = any(_MARK in attributes for attributes in self._attributes)
        if inside or any(module.shared_weight is not None for module in self._reparameterized):
            raise ValueError("this model is already inside an accumulate or standardized block: leave that one first")

    def _require_no_gradients(self) -> None:
        if any(parameter.grad is not None for parameter in self._parameters):
            name = next(name for name, parameter in self._model.named_parameters() if parameter.grad is not None)
            raise ValueError(
                f"{name} already has a gradient, which would be weighted wrongly: call optimizer.zero_grad() before the block"
            )


class BufferCopies:
    """The buffers of a model as they were, in memory that is used again for as long as they are the same tensors."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners = [module._buffers for module in modules]
        self._places: list[tuple[dict[str, Tensor | None], str]] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Copy them as they are now."""
        buffers = [buffer for owner in self._owners for buffer in owner.values() if buffer is not None]
        same = len(buffers) == len(self._buffers) and all(map(operator.is_, buffers, self._buffers))
        if same and all(buffer.shape == copy.shape for buffer, copy in zip(buffers, self._copies, strict=True)):
            if buffers:
                torch._foreach_copy_(self._copies, buffers)  # one call, on a GPU one kernel
            return
        self._buffers, self._copies = buffers, [buffer.clone() for buffer in buffers]
        self._places = [(own, name) for own in self._owners for name, buffer in own.items() if buffer is not None]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give them their values back, also where a forward has put another tensor in a buffer's place."""
        for (place, name), buffer, copy in zip(self._places, self._buffers, self._copies, strict=True):
            buffer.copy_(copy)
            place[name] = buffer


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _require_bare(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"got a model wrapped in {type(model).__name__}: pass the bare model (model.module) and call it in the block; "
            "accumulate reduces the gradients itself"
        )


def _require_own(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    own = set(map(id, parameters))
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if foreign:
        raise ValueError(
            f"the optimizer also holds {len(foreign)} parameters that are not the model's (first: shape "
            f"{tuple(foreign[0].shape)}): pass one module that holds all, such as nn.ModuleList([model, head])"
        )
