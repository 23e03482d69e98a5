"""The sum over processes that ends an optimizer step: gradients, counts and moments in one flat tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

ProcessGroup = Literal["world"] | dist.ProcessGroup | None
"""`"world"`: all processes where torch.distributed is initialized; a group of it; None: this process alone."""


@dataclass(frozen=True)
class Totals:
    """What a step saw: `first` is the process's first non-zero count, the unit its gradients are weighted in."""

    first: int | Tensor
    samples: int | Tensor
    images: int | Tensor


def resolve_group(process_group: ProcessGroup) -> dist.ProcessGroup | None:
    """The group to reduce over, None if this process is alone.

    Raises:
        ValueError: neither "world", a group nor None.
    """
    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(f"process_group must be 'world', a torch.distributed group or None, got {process_group!r}")
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if isinstance(process_group, str) else process_group
    return group if group is not None and dist.get_world_size(group) > 1 else None


def reduce_gradients(
    parameters: Sequence[nn.Parameter], totals: Totals, moments: Sequence[Tensor], group: dist.ProcessGroup | None
) -> Totals:
    """Turn gradients in units of `totals.first` into those of the mean over all samples, over all processes.

    Args:
        parameters: all of the model; their `.grad` are replaced.
        totals: of this process.
        moments: tensors summed over the processes in place.
        group: None for one process.

    Returns:
        The totals over all processes.

    Raises:
        ValueError: no process had a sample; raised on all.
    """
    if group is None:
        _require_samples(totals.samples, known_elsewhere=False)
        _scale(parameters, totals)
        return totals
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter that requires a gradient: nothing to train")
    flat = _flatten(trained, totals, moments)
    dist.all_reduce(flat, group=group)
    return _unflatten(flat, trained, totals, moments)


def _require_samples(samples: int | Tensor, *, known_elsewhere: bool) -> None:
    # A count on an accelerator is not read: that would wait for the device at every step.
    countable = isinstance(samples, int) or samples.device.type == "cpu"
    if countable and not known_elsewhere and int(samples) == 0:
        raise ValueError(
            "no process called step.backward with a sample in this block: there is no gradient to step with"
        )


def _scale(parameters: Sequence[nn.Parameter], totals: Totals) -> None:
    known = isinstance(totals.first, int) and isinstance(totals.samples, int)
    if known and totals.first == totals.samples:  # one micro-batch
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    with torch.no_grad():
        if known:
            torch._foreach_mul_(gradients, totals.first / totals.samples)
            return
        counts = (torch.as_tensor(count, device=gradients[0].device) for count in (totals.first, totals.samples))
        first, samples = counts
        torch._foreach_mul_(gradients, first / samples.clamp_min(1))


@torch.no_grad()
def _flatten(parameters: list[nn.Parameter], totals: Totals, moments: Sequence[Tensor]) -> Tensor:
    """`[gradients in samples, moments, which parameters have a gradient, samples, images]`, float32 or wider.

    Gradients times `first` are sums over samples: wider than fp16, where they would overflow.
    """
    device = parameters[0].device
    dtype = torch.float32
    for tensor in (*parameters, *moments):
        dtype = torch.promote_types(dtype, tensor.dtype)
    first = totals.first.to(device, dtype) if isinstance(totals.first, Tensor) else totals.first
    gradients = [
        (parameter.new_zeros(parameter.numel()) if parameter.grad is None else parameter.grad.reshape(-1)).to(dtype)
        * first
        for parameter in parameters
    ]
    used = [torch.full((1,), float(p.grad is not None), device=device, dtype=dtype) for p in parameters]
    counts = [
        count.to(device, dtype).reshape(1)
        if isinstance(count, Tensor)
        else torch.full((1,), count, device=device, dtype=dtype)
        for count in (totals.samples, totals.images)
    ]
    return torch.cat([*gradients, *(moment.to(dtype) for moment in moments), *used, *counts])


@torch.no_grad()
def _unflatten(flat: Tensor, parameters: list[nn.Parameter], totals: Totals, moments: Sequence[Tensor]) -> Totals:
    sizes = [parameter.numel() for parameter in parameters]
    pieces = torch.split(flat, [*sizes, *(moment.numel() for moment in moments), len(parameters), 1, 1])
    used, samples, images = pieces[-3:]
    own = totals.samples
    _require_samples(samples.squeeze(), known_elsewhere=isinstance(own, int) and own > 0)
    if isinstance(own, int) and own == 0 and samples.device.type != "cpu":
        _require_samples(int(samples), known_elsewhere=False)
    for moment, piece in zip(moments, pieces[len(sizes) : len(sizes) + len(moments)], strict=True):
        moment.copy_(piece)
    # Only a process that misses a gradient has to learn (and, on a GPU, wait for) whether another has it.
    complete = all(parameter.grad is not None for parameter in parameters)
    has_gradient = [True] * len(parameters) if complete else (used > 0).tolist()
    for parameter, piece, present in zip(parameters, pieces, has_gradient, strict=False):
        if present:
            mean = (piece / samples.clamp_min(1)).view_as(parameter)
            parameter.grad = mean.to(parameter.dtype)
    return Totals(first=1, samples=samples.squeeze(), images=images.squeeze())
