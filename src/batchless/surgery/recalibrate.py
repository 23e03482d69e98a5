"""Re-estimate the statistics that a model normalizes by in evaluation mode."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchless.nn.batch_norm import BatchNorm
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm
from batchless.nn.precision import at_least_float32
from batchless.nn.standardized import standardized
from batchless.surgery.dataflow import as_arguments
from batchless.surgery.recognize import is_batch_normalization

_ByBatch = _BatchNorm | BatchNorm
"""Normalizations by the batch's statistics in training; the others normalize by constants in either mode."""


@dataclass
class _Moments:
    """Mean and sum of squared deviations of everything a layer saw, merged batch by batch (Chan et al., 1979)."""

    count: int
    mean: Tensor
    squares: Tensor

    def add(self, x: Tensor) -> None:
        """Merge `x` `[N, C, ..]`."""
        values = x.detach().transpose(0, 1).reshape(x.shape[1], -1).to(self.mean.dtype)
        if values.shape[1] == 0:
            return
        var, mean = torch.var_mean(values, 1, correction=0)
        total = self.count + values.shape[1]
        delta = mean - self.mean
        self.squares += var * values.shape[1] + delta.square() * (self.count * values.shape[1] / total)
        self.mean += delta * (values.shape[1] / total)
        self.count = total


def recalibrate(model: nn.Module, batches: Iterable[object]) -> None:
    """Set running statistics and estimates to the mean and variance over all `batches`, in place.

    Batch normalization runs as in training (each batch by its own statistics), estimated and frozen statistics as in
    evaluation, each batch by what the layer has seen so far; everything else, dropout say, as in evaluation. Statistics
    are those of all values together, so batches may be small and of unequal size; more of them estimate better. Running
    variances are unbiased (torch's convention), estimates biased.

    Args:
        model: its modes are as before afterwards; parameters and gradients are not touched.
        batches: what the model's forward takes: tensors, or tuples of positional arguments. From a loader of images and
            labels pass `(images for images, labels in loader)`.

    Raises:
        ValueError: no batches, or no layer with statistics. After any exception the statistics are as before.

    Source: precise BatchNorm, Wu & Johnson, arXiv 2105.07576.
    """
    norms: list[Any] = [
        module
        for module in model.modules()
        if (is_batch_normalization(module) or isinstance(module, EstimatedBatchNorm))
        and module.running_mean is not None
    ]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no layer with running statistics or estimates: nothing to recalibrate"
        )
    modes = [(module, module.training) for module in model.modules()]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    observers = [_Observer(norm) for norm in norms]
    handles = [observer.norm.register_forward_pre_hook(observer, with_kwargs=True) for observer in observers]
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.training = isinstance(norm, _ByBatch)
        with torch.no_grad(), standardized(model):
            for batch in batches:
                model(*as_arguments(batch))
                seen += 1
        if seen == 0:
            raise ValueError("recalibrate needs at least one batch, got none")
        for observer in observers:
            observer.finish(batches=seen)
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


class _Observer:
    """A forward pre-hook that merges a layer's input into its moments; estimates follow at once."""

    def __init__(self, norm: Any) -> None:
        mean = norm.running_mean
        wide = mean.new_zeros(mean.shape, dtype=at_least_float32(mean.dtype))
        self.norm, self.moments = norm, _Moments(0, wide, wide.clone())

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        self.moments.add(inputs[0] if inputs else next(iter(keywords.values())))
        if not isinstance(self.norm, _ByBatch):
            self._write(correction=0)

    def finish(self, *, batches: int) -> None:
        """Set the layer's statistics and counter; a layer that saw nothing keeps its own."""
        by_batch = isinstance(self.norm, _ByBatch)
        self._write(correction=int(by_batch))
        counter = (
            self.norm.moves
            if isinstance(self.norm, EstimatedBatchNorm)
            else getattr(self.norm, "num_batches_tracked", None)
        )
        if self.moments.count and counter is not None:
            counter.fill_(batches)

    def _write(self, *, correction: int) -> None:
        if self.moments.count:
            variance = self.moments.squares / max(self.moments.count - correction, 1)
            self.norm.running_mean.copy_(self.moments.mean)
            self.norm.running_var.copy_(variance)
