"""All micro-batches of an optimizer step in one forward, each with the statistics that it would have had on its own.

Weights do not change between the micro-batches of a step, so whether they go through the network one after the other or
together is the same arithmetic, if every layer that keeps statistics treats each micro-batch apart. On a CPU, 64 images of
32 x 32 in one forward take a fifth of the time of 64 forwards. `tests/test_studies.py` compares both, gradients and buffers.

Letters: N images, K of each micro-batch, M = N / K micro-batches, C channels. Image n belongs to micro-batch n mod M, so
that `[N, C, ..]` is `[K, M C, ..]` without moving memory.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.nn import BatchChannelNorm, channel_norm
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm, move_rate
from batchless.nn.normalized_samples import normalize_samples


def together(model: nn.Module, images_per_forward: int) -> nn.Module:
    """`model`, changed in place, for forwards of several micro-batches of `images_per_forward` images each.

    Batch normalization and estimates that move in the forward are replaced; estimates that move at a step's end, group
    normalization and convolutions do not know how many images there are. Rows come out in the order in which they went in.

    Fewer images than `images_per_forward` are one smaller micro-batch, as at the end of an epoch.

    Raises:
        ValueError: when training on another number of images that `images_per_forward` does not divide.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.BatchNorm2d:
                setattr(parent, name, _BatchNorms(layer, images_per_forward))
            elif isinstance(layer, BatchChannelNorm) and _moves_in_forward(layer.batch_norm):
                setattr(parent, name, _BatchChannelNorms(layer, images_per_forward))

    def interleaved(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        return (_dealt(inputs[0], images_per_forward),) if module.training else None

    def restored(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return _gathered(output, images_per_forward) if module.training else None

    model.register_forward_pre_hook(interleaved)
    model.register_forward_hook(restored)
    return model


def _moves_in_forward(layer: nn.Module) -> bool:
    return isinstance(layer, EstimatedBatchNorm) and layer.update == "forward"


def _dealt(images: Tensor, size: int) -> Tensor:
    """From micro-batch after micro-batch to image n in micro-batch n mod M."""
    size = min(size, len(images))
    if len(images) % size:
        raise ValueError(f"{len(images)} images are no whole number of micro-batches of {size}")
    return images.unflatten(0, (-1, size)).transpose(0, 1).flatten(0, 1)


def _gathered(rows: Tensor, size: int) -> Tensor:
    size = min(size, len(rows))
    return rows.unflatten(0, (size, -1)).transpose(0, 1).flatten(0, 1)


class _BatchNorms(nn.Module):
    """`nn.BatchNorm2d` on each micro-batch apart: as many channels as there are micro-batches times channels."""

    def __init__(self, layer: nn.BatchNorm2d, images_per_forward: int) -> None:
        super().__init__()
        self.layer, self.size = layer, images_per_forward

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        if not self.training:
            output: Tensor = layer(input)
            return output
        size = min(self.size, len(input))
        count = len(input) // size
        rows = input.reshape(size, count * input.shape[1], *input.shape[2:])
        weight, bias = layer.weight.repeat(count), layer.bias.repeat(count)
        normalized, mean, rstd = torch.ops.aten.native_batch_norm(rows, weight, bias, None, None, True, 0.0, layer.eps)
        with torch.no_grad():
            values = rows.numel() // rows.shape[1]
            unbiased = (rstd.pow(-2) - layer.eps) * (values / (values - 1))
            rates = (layer.momentum,) * count
            for running, new in ((layer.running_mean, mean), (layer.running_var, unbiased)):
                running.copy_(_moved(running, new.view(count, -1), rates)[-1])
            layer.num_batches_tracked += count
        return normalized.reshape(input.shape)


class _BatchChannelNorms(nn.Module):
    """Micro-batch BCN whose estimates move before each micro-batch is normalized, by the authors' rule."""

    def __init__(self, layer: BatchChannelNorm, images_per_forward: int) -> None:
        super().__init__()
        self.layer, self.size = layer, images_per_forward

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        if not self.training:
            output: Tensor = layer(input)
            return output
        input = input.contiguous()
        step = layer.batch_norm
        mean, var = (value.flatten() for value in self._moved_estimates(step, input))
        # Each image by estimates of its own: as many channels as there are images times channels.
        weight, bias = step.weight.repeat(len(input)), step.bias.repeat(len(input))
        rows = F.batch_norm(input.flatten(0, 1)[None], mean, var, weight, bias, False, 0.0, step.eps)
        return channel_norm(rows.view(input.shape), layer.num_groups, layer.weight, layer.bias, layer.eps)

    @torch.no_grad()
    def _moved_estimates(self, step: EstimatedBatchNorm, input: Tensor) -> tuple[Tensor, Tensor]:
        """What each image is normalized by, `[N, C]` twice; the buffers take the values after the last move."""
        samples, size = normalize_samples(input), min(self.size, len(input))
        mean, var = (value.unflatten(0, (size, -1)) for value in (samples.mean, samples.rstd.pow(-2)))  # [K, M, C]
        count = mean.shape[1]
        rates = _rates(size, float(step.memory), int(step.moves) if step.warmup else None, count)
        means = _moved(step.running_mean, mean.mean(0), rates)
        before = torch.cat([step.running_mean[None], means[:-1]])
        variances = _moved(step.running_var, (var + (mean - before).square()).mean(0), rates)
        step.running_mean.copy_(means[-1])
        step.running_var.copy_(variances[-1])
        step.moves += count
        return means.repeat(size, 1), variances.repeat(size, 1)


def _moved(start: Tensor, values: Tensor, rates: tuple[float, ...]) -> Tensor:
    """`s_j = (1 - r_j) s_(j-1) + r_j x_j` for all j: `[M, C]` from the start `[C]`, the values `[M, C]` and the rates."""
    weights = _weights(rates).to(values)
    return weights[:, 1:] @ values + weights[:, :1] * start


@lru_cache(maxsize=64)
def _weights(rates: tuple[float, ...]) -> Tensor:
    """Row j: the weights of the start and of the values 1..M in `s_j`, float64 `[M, M + 1]`."""
    rows = [torch.zeros(len(rates) + 1, dtype=torch.float64)]
    rows[0][0] = 1
    for j, rate in enumerate(rates, 1):
        row = (1 - rate) * rows[-1]
        row[j] = rate
        rows.append(row)
    return torch.stack(rows[1:])


@lru_cache(maxsize=64)
def _rates(images: int, memory: float, moves: int | None, count: int) -> tuple[float, ...]:
    """The rates of the next `count` moves by `images` images each; `moves` are those before, None without warm-up."""
    of_memory = torch.tensor(memory, dtype=torch.float64)
    numbers = [None if moves is None else torch.tensor(moves + j) for j in range(1, count + 1)]
    return tuple(float(move_rate(images, of_memory, number)) for number in numbers)
