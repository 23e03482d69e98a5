"""The memory of a training step, counted without computing it: on fake tensors, which have sizes but no values."""

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from batchless.advise.fake_forward import TrainingLoss
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm
from batchless.nn.reparameterized import Reparameterized
from batchless.nn.standardized import standardized
from batchless.surgery.lean import lean


@dataclass(frozen=True)
class StepMemory:
    """What a forward and a backward pass of one micro-batch need, beside weights, gradients and `W_hat`.

    Attributes:
        images: of the micro-batch.
        kept: bytes that live between forward and backward: what was saved for the backward pass.
        peak: the most bytes alive at once, in either pass.
        cost: of both passes; see `Meter`.
    """

    images: int
    kept: int
    peak: int
    cost: float


@dataclass(frozen=True)
class WeightMemory:
    """What standardizing the weights once per optimizer step needs.

    Attributes:
        extra: bytes beside W and one gradient for each weight: `W_hat` and what its pull-back keeps.
        cost: of standardization and pull-back; see `Meter`.
    """

    extra: int
    cost: float


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators make, for as long as they live, and the operators' cost.

    Storages that were there before are not counted, and views and results in place are not counted twice.

    The cost is the roofline's time, in bytes: of each operator the larger of the bytes it reads and writes, and of its
    floating point operations over `flops_per_byte`, how many a machine does while it moves one byte.

    Args:
        flops_per_byte: of the machine.
    """

    def __init__(self, flops_per_byte: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops_per_byte = flops_per_byte
        self.held = self.peak = 0
        self.cost = 0.0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        given = {id(tensor.untyped_storage()) for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if id(storage) not in given:
                self._count(storage)
        if outputs and not _is_view(func) and "empty" not in func.overloadpacket.__name__:
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula is not None else 0
            self.cost += max(moved, flops / self.flops_per_byte)
        return result

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self.held -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)


class FakeStep:
    """A fake copy of a model in an optimizer step, as inside `batchless.accumulate`.

    Args:
        model: not changed.
        level: of `batchless.lean`, applied to the copy.
        flops_per_byte: of the machine; see `Meter`.

    Raises:
        ValueError: a level that does nothing for this model.
    """

    def __init__(self, model: nn.Module, *, level: int = 0, flops_per_byte: float) -> None:
        # Lean is the call of a whole model, and a detector's parts are called one by one: their caller is the model.
        loss: nn.Module = TrainingLoss(model)
        if level:
            loss, _ = lean(loss, level)
        self._mode = FakeTensorMode()
        with FakeCopyMode(self._mode):
            self._model = copy.deepcopy(loss).train()
        self._flops_per_byte = flops_per_byte

    def weights(self) -> WeightMemory:
        """What the standardized weights need, and the two passes that make and pull them back."""
        meter = Meter(self._flops_per_byte)
        with self._mode, _quiet(), meter:
            with standardized(self._model):
                held = meter.held
                for layer in self._model.modules():
                    if isinstance(layer, Reparameterized) and layer.shared_weight is not None:
                        layer.shared_weight.grad = torch.empty_like(layer.shared_weight)
            self._model.zero_grad()
        return WeightMemory(extra=held, cost=meter.cost)

    def micro_batch(self, images: int, shape: tuple[int, ...]) -> StepMemory:
        """What `images` images of `shape` need, where an earlier micro-batch has left its gradients.

        Raises:
            ValueError: the model does not train on so many images of that shape.
        """
        estimated = [module for module in self._model.modules() if isinstance(module, EstimatedBatchNorm)]
        meter = Meter(self._flops_per_byte)
        with self._mode, _quiet():
            try:
                for layer in estimated:
                    if layer.update == "step":
                        layer.start_collecting()
                with standardized(self._model):
                    for weight in self._weights_in_use():
                        weight.grad = torch.empty_like(weight)
                    with meter:
                        loss = self._model(torch.rand(images, *shape))
                        kept = meter.held
                        loss.backward()
            except Exception as error:
                raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
            finally:
                self._model.zero_grad()
                for layer in estimated:
                    layer.stop_collecting()
        return StepMemory(images=images, kept=kept, peak=meter.peak, cost=meter.cost)

    def _weights_in_use(self) -> Iterator[Tensor]:
        """The leaves that collect gradients: shared weights in place of those that they stand for."""
        layers = [module for module in self._model.modules() if isinstance(module, Reparameterized)]
        shared = [(layer.weight, layer.shared_weight) for layer in layers if layer.shared_weight is not None]
        replaced = {id(weight) for weight, _ in shared}
        yield from (weight for _, weight in shared if weight.requires_grad)
        for parameter in self._model.parameters():
            if parameter.requires_grad and id(parameter) not in replaced:
                yield parameter


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of few values in a group: `batchless doctor` tells of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    """Whether an operator's results share memory with its arguments, and it writes to none of them."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
