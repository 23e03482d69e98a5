"""One optimizer step over any number of micro-batches and processes, exactly as over the whole batch."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from batchless.nn.estimated_batch_norm import EstimatedBatchNorm
from batchless.nn.precision import at_least_float32
from batchless.nn.reparameterized import Reparameterized
from batchless.nn.standardized import parameters_of, weights_shared
from batchless.nn.step_estimates import StepEstimates
from batchless.train.all_reduce import ProcessGroup, Totals, reduce_gradients, resolve_group
from batchless.train.clipping import Clip
from batchless.train.guard import Guard, uncompiled

T = TypeVar("T")


class Step:
    """One optimizer step in the making: call `backward` once for each micro-batch."""

    def __init__(self, scaler: GradScaler | None) -> None:
        self._scaler = scaler
        self._open = True
        self.first: int | Tensor = 0
        self.samples: int | Tensor = 0
        self.images: int | Tensor = 0

    def backward(self, mean_loss: Tensor, samples: int | Tensor, images: int | Tensor | None = None) -> None:
        """Add the gradient of one micro-batch, weighted by its share of the step's samples.

        Args:
            mean_loss: the loss averaged over the micro-batch's samples, 0-d. Where no sample counts (every pixel
                ignored) let it be finite: sum / max(count, 1).
            samples: how many samples `mean_loss` averages over: images, or valid pixels. 0 adds nothing.
            images: how many images the micro-batch holds, the unit of the estimates' memory; `samples` by default.
                Both may be 0-d tensors on the device, which are not synchronized.

        Raises:
            ValueError: a loss that is not 0-d, a count that is none, or a step that has ended.
        """
        samples = self._counted(mean_loss, samples, images)
        if isinstance(self.first, Tensor):
            count = torch.zeros_like(self.first) + samples
            self._backward(mean_loss * (count / self.first.clamp_min(1)))
        elif samples:
            self._backward(mean_loss if samples == self.first else mean_loss * (samples / self.first))

    def backward_sum(self, summed_loss: Tensor, samples: int | Tensor, images: int | Tensor | None = None) -> None:
        """As `backward`, of the loss summed over the micro-batch's samples: one division less, there and back.

        Args:
            summed_loss: `mean_loss` times `samples`, 0-d.
            samples: as in `backward`.
            images: as in `backward`.

        Raises:
            ValueError: as `backward`.
        """
        samples = self._counted(summed_loss, samples, images)
        if isinstance(self.first, Tensor):
            self._backward(summed_loss / self.first.clamp_min(1))
        elif samples:
            if self._scaler is None:
                torch.autograd.backward(summed_loss, summed_loss.new_full((), 1 / self.first))
            else:
                self._backward(summed_loss / self.first)

    def _counted(self, loss: Tensor, samples: int | Tensor, images: int | Tensor | None) -> int | Tensor:
        """The checked count of samples, added to the step's; `first` becomes a tensor with the first count that is one."""
        if not self._open:
            raise ValueError(
                "this step has ended: call step.backward inside the `with batchless.accumulate(...)` block"
            )
        if loss.dim() != 0:
            raise ValueError(
                f"the loss must be one number (0-d), got shape {tuple(loss.shape)}: average it, or give its sum to backward_sum"
            )
        samples = _count(samples, "samples")
        self.images = self.images + (samples if images is None else _count(images, "images"))
        self.samples = self.samples + samples
        if isinstance(samples, int) and isinstance(self.first, int):
            self.first = self.first or samples
        else:
            count = torch.zeros((), device=loss.device, dtype=at_least_float32(loss.dtype)) + samples
            first = torch.zeros_like(count) + self.first
            self.first = torch.where(first > 0, first, count)
        return samples

    def _backward(self, loss: Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Refuse further calls."""
        self._open = False


def _count(value: int | Tensor, name: str) -> int | Tensor:
    """A whole number or a 0-d tensor; numpy's whole numbers become Python's."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"{name} must be a whole number of 0 or more, or a 0-d tensor, got {value!r}")
    return count


@contextmanager
def accumulate(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    clip: Clip | None = None,
    scaler: GradScaler | None = None,
    process_group: ProcessGroup = "world",
) -> Iterator[Step]:
    """One optimizer step over the micro-batches of the block, equal to the step over the whole batch.

    With micro-batches of n_k samples and mean losses L_k, on all processes together, the step uses the gradient of
    `sum_k n_k L_k / sum_k n_k`. On entry every weight is standardized once (`batchless.standardized`) and estimated
    statistics stop moving; on leaving: pull the gradients back through the standardization, all-reduce (gradients,
    counts and moments, one flat tensor), unscale, clip, step, move the estimates once, set gradients to None.

    The model is never wrapped; all processes must start from equal parameters. A process without data takes part by
    entering the block without calling `backward`. A parameter that no process used keeps `grad = None` through the step.

    Args:
        model: the bare model (not wrapped in DistributedDataParallel); `torch.compile`d is fine.
        optimizer: steps once.
        clip: called with the model before the step: `AGC`, `ClipNorm`, or any function of the model.
        scaler: a GradScaler for fp16; the step unscales, steps and updates it.
        process_group: `"world"`: all processes, where torch.distributed is initialized; a group; None: never reduce.

    Yields:
        A `Step`, whose `backward(mean_loss, samples=n)`, or `backward_sum(summed_loss, samples=n)`, takes the place of
        `loss.backward()`.

    Raises:
        ValueError: gradients already there, a block inside a block, a wrapped model, an optimizer of other parameters too,
            an unknown process group, no samples on any process. After
            this or any other exception in the block, parameters and buffers are as before it and gradients None (an
            exception out of `optimizer.step` itself may leave parameters half stepped).

    >>> from torch import nn
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with accumulate(model, optimizer) as step:
    ...     for x in torch.randn(4, 1, 2):
    ...         step.backward(model(x).square().mean(), samples=len(x))
    """
    with Accumulation(model, optimizer, clip=clip, scaler=scaler, process_group=process_group).step() as step:
        yield step


class Accumulation:
    """`accumulate` for many steps of a model whose layers stay the same: they are looked for once.

    In a step of a small network looking for them takes as long as a layer. Arguments and errors are those of `accumulate`,
    and `keep_buffers`: whether buffers get their values back after an exception in a step. Copying them takes as long as
    looking for them, for nothing where they are loaded anew in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        clip: Clip | None = None,
        scaler: GradScaler | None = None,
        process_group: ProcessGroup = "world",
        keep_buffers: bool = True,
    ) -> None:
        self._model, self._optimizer, self._clip, self._scaler = model, optimizer, clip, scaler
        self._group = resolve_group(process_group)
        modules = list(uncompiled(model).modules())
        self._parameters = parameters_of(modules)
        self._guard = Guard(
            uncompiled(model), optimizer, modules=modules, parameters=self._parameters, keep_buffers=keep_buffers
        )
        self._reparameterized = [module for module in modules if isinstance(module, Reparameterized)]
        self._estimates = StepEstimates(_estimated_layers(modules, several_processes=self._group is not None))

    @contextmanager
    def step(self) -> Iterator[Step]:
        """One step, as `accumulate` makes it."""
        model, step = self._model, Step(self._scaler)
        with self._guard.step():
            try:
                self._estimates.start()
                with weights_shared(self._reparameterized, self._parameters, model):
                    yield step
                step.close()
                totals = Totals(step.first, step.samples, step.images)
                totals = reduce_gradients(self._parameters, totals, self._estimates.sums(), self._group)
                _step_optimizer(model, self._optimizer, self._clip, self._scaler)
                self._estimates.move(totals.images)
            finally:
                step.close()
                self._estimates.stop()


def _step_optimizer(model: nn.Module, optimizer: Optimizer, clip: Clip | None, scaler: GradScaler | None) -> None:
    if scaler is None:
        if clip is not None:
            clip(model)
        optimizer.step()
        return
    try:
        scaler.unscale_(optimizer)
        if clip is not None:
            clip(model)
        scaler.step(optimizer)
    except BaseException:
        scaler.update(scaler.get_scale())  # forget that this optimizer was unscaled; the scale stays
        raise
    scaler.update()


def _estimated_layers(modules: Iterable[nn.Module], *, several_processes: bool) -> list[EstimatedBatchNorm]:
    layers = [module for module in modules if isinstance(module, EstimatedBatchNorm)]
    if several_processes and any(layer.update == "forward" for layer in layers):
        raise ValueError(
            "estimates with update='forward' would differ between processes: use update='step', one move for all"
        )
    return [layer for layer in layers if layer.update == "step"]


@dataclass(frozen=True)
class batched(Generic[T]):
    """The items of `loader` in lists of `k`, the last one possibly shorter.

    Args:
        loader: any iterable, such as a DataLoader of micro-batches.
        k: items in a list, 1 or more.

    Raises:
        ValueError: k below 1.

    >>> list(batched(range(5), 2)), len(batched([1, 2, 3], 2))
    ([[0, 1], [2, 3], [4]], 2)
    """

    loader: Iterable[T]
    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"batched needs k of 1 or more micro-batches, got {self.k}")

    def __iter__(self) -> Iterator[list[T]]:
        items = iter(self.loader)
        while group := list(itertools.islice(items, self.k)):
            yield group

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return -(-len(self.loader) // self.k)
