"""What a task adds to the one training loop: a loss, a metric, pictures, and its data."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

Batch = TypeVar("Batch")
BatchIn = TypeVar("BatchIn", contravariant=True)
BatchOut = TypeVar("BatchOut", covariant=True)


class Metric(Protocol[BatchIn]):
    """Sums over batches, divided once at the end."""

    def update(self, model: nn.Module, batch: BatchIn) -> None:
        """Add what `model` makes of `batch`."""

    def merge(self, later: Any) -> None:
        """Add a metric of the same kind over the images after this one's (of another process)."""

    def compute(self) -> Mapping[str, float]:
        """The values by name; `loss` and the task's main figure among them."""


class Task(Protocol[Batch]):
    """What is learned: the loop knows nothing else of it."""

    @property
    def main_figure(self) -> str:
        """The metric's value that tells the best checkpoint; higher is better."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int | Tensor]:
        """Sum of the loss over the batch's samples, and how many they are (images, or valid pixels)."""

    def images(self, batch: Batch) -> int:
        """How many images the batch holds."""

    def metric(self) -> Metric[Batch]:
        """A fresh metric."""

    def to(self, batch: Batch, device: str) -> Batch:
        """The batch on the device."""

    def picture(self, metric: Any, folder: Path) -> None:
        """Write into `folder` what the metric of the last evaluation shows: pictures of predictions."""


class Data(Protocol[BatchOut]):
    """Where the batches come from."""

    def order(self, epoch: int) -> Sequence[int]:
        """The training images in the order in which the epoch shows them."""

    def train(self, epoch: int, micro_batches: Sequence[Sequence[int]]) -> Iterable[BatchOut]:
        """A batch for each list of images; its random numbers depend on (seed, epoch, image) only."""

    @property
    def test_images_count(self) -> int:
        """Test images."""

    def test(self, part: range) -> Iterable[BatchOut]:
        """Evaluation batches of the test images in `part`, in order."""
