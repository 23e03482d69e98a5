"""Several processes as one: who I am, and what must be equal on all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchless.nn.batch_norm import BatchNorm

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One of the processes that train together.

    Attributes:
        rank: from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """The items of this process: every `count`-th.

        >>> Processes(1, 2).share([10, 11, 12, 13, 14])
        [11, 13]
        """
        return items[self.rank :: self.count]

    def part(self, length: int) -> range:
        """Its consecutive part of `range(length)`; in order of rank they make the whole.

        >>> [Processes(rank, 3).part(8) for rank in range(3)]
        [range(0, 2), range(2, 5), range(5, 8)]
        """
        return range(length * self.rank // self.count, length * (self.rank + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: ValueError | None) -> None:
        """Raise the first process's error, if it has one, on every process: otherwise the others would wait for it for ever."""
        message = self.gather(None if error is None else str(error))[0]
        if error is not None:
            raise error
        if message is not None:
            raise ValueError(message)

    @torch.no_grad()
    def start_equal(self, model: nn.Module) -> None:
        """Give all processes the parameters and buffers of the first."""
        if self.count > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Make running statistics of batches, which each process has of its own images, the mean over the processes."""
        statistics = _running_statistics(model) if self.count > 1 else []
        if not statistics:
            return
        flat = torch.cat([buffer.reshape(-1).float() for buffer in statistics])
        dist.all_reduce(flat)
        flat /= self.count
        for buffer, mean in zip(statistics, torch.split(flat, [b.numel() for b in statistics]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """By type: estimates are equal on all processes already, and so are cross-device statistics."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, BatchNorm)
    return [
        buffer
        for module in model.modules()
        if isinstance(module, kinds)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


@contextmanager
def processes_of_torchrun(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes that `torchrun` has started, for the time of the block, and the device of this one.

    Yields:
        This process and its device: `cuda` becomes `cuda:<local rank>`. Without torchrun: one process, `device`.

    Raises:
        ValueError: torchrun's variables are there but the processes cannot reach each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        known = dist.is_initialized()
        yield (Processes(dist.get_rank(), dist.get_world_size()) if known else Processes()), device
        return
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of torchrun cannot reach each other: {' '.join(str(error).split())}"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
