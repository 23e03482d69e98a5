"""What a task adds to the one training loop: a loss, a metric, and its data."""

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor, nn

Batch = TypeVar("Batch")
BatchIn = TypeVar("BatchIn", contravariant=True)
BatchOut = TypeVar("BatchOut", covariant=True)


class Metric(Protocol[BatchIn]):
    """Sums over batches, divided once at the end."""

    def update(self, model: nn.Module, batch: BatchIn) -> None:
        """Add what `model` makes of `batch`."""

    def compute(self) -> Mapping[str, float]:
        """The values by name; `loss` and the task's main figure among them."""


class Task(Protocol[Batch]):
    """What is learned: the loop knows nothing else of it."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int | Tensor]:
        """Sum of the loss over the batch's samples, and how many they are (images, or valid pixels)."""

    def images(self, batch: Batch) -> int:
        """How many images the batch holds."""

    def metric(self) -> Metric[Batch]:
        """A fresh metric."""

    def to(self, batch: Batch, device: str) -> Batch:
        """The batch on the device."""


class Data(Protocol[BatchOut]):
    """Where the batches come from."""

    @property
    def images_per_epoch(self) -> int:
        """Training images."""

    def train(self, epoch: int, *, images_per_forward: int, images: int) -> Iterable[BatchOut]:
        """Training micro-batches of an epoch, its first `images` images."""

    def test(self) -> Iterable[BatchOut]:
        """Evaluation batches, each image once."""
