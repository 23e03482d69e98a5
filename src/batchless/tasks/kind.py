"""What differs from task to task before and after the one training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from torch import nn

from batchless.data import ChannelStatistics
from batchless.tasks.config import TrainConfig
from batchless.train.task import Batch, Data, Task


@dataclass(frozen=True, kw_only=True)
class Setup(Generic[Batch]):
    """A task with its data.

    Attributes:
        task: what is learned.
        data: the batches.
        classes: their names, in the order of the labels.
        statistics: by which images are normalized.
        notes: what was found in the data, a sentence each.
    """

    task: Task[Batch]
    data: Data[Batch]
    classes: tuple[str, ...]
    statistics: ChannelStatistics
    notes: tuple[str, ...] = ()


def whole_network(model: nn.Module) -> nn.Module:
    """The network itself."""
    return model


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What a run does by its task.

    Attributes:
        set_up: the task on the configured data; ValueError for data that is missing, damaged or of another kind, or settings
            that do not fit them.
        build: the network with plain BatchNorm and random weights, for so many classes; ValueError for an unknown name.
        example: what the network takes in evaluation, in its size: positional arguments.
        size: of images, in words, and the settings that decide it.
        pretrained: the part of the network that `weights` are of; the network itself: all of it.
    """

    set_up: Callable[[TrainConfig], Setup[Any]]
    build: Callable[[TrainConfig, int], nn.Module]
    example: Callable[[TrainConfig, nn.Module], tuple[object, ...]]
    size: Callable[[TrainConfig], tuple[str, str]]
    pretrained: Callable[[nn.Module], nn.Module] = whole_network


def square_size(config: TrainConfig) -> tuple[str, str]:
    """The size of tasks on squares, and its setting."""
    size = config.data.image_size
    return f"{size}x{size}", "data.image_size"
