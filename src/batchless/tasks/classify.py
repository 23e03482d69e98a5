"""Classification of single images."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.data import Augment, ChannelStatistics, ImageDataset, batches, epoch_order

Batch = tuple[Tensor, Tensor]
"""Images `[N, 3, S, S]` and labels `[N]`."""

_EVALUATION_IMAGES_PER_FORWARD = 64


class Classify:
    """Cross-entropy and accuracy; a `batchless.train.Task`."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Summed cross-entropy, and the number of images."""
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)

    def images(self, batch: Batch) -> int:
        """Number of images."""
        return len(batch[1])

    def metric(self) -> "Accuracy":
        """Accuracy and loss."""
        return Accuracy()

    def to(self, batch: Batch, device: str) -> Batch:
        """The batch on the device."""
        return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


@dataclass
class Accuracy:
    """Share of images whose highest score is their label's, and the mean cross-entropy."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Add a batch."""
        images, labels = batch
        scores = model(images).float()
        found = {
            "accuracy": (scores.argmax(1) == labels).sum(),
            "loss": F.cross_entropy(scores, labels, reduction="sum"),
        }
        self.sums = {name: self.sums.get(name, torch.zeros_like(value)) + value for name, value in found.items()}
        self.images += len(labels)

    def compute(self) -> dict[str, float]:
        """`accuracy` from 0 to 1, and `loss`."""
        return {name: float(value) / max(self.images, 1) for name, value in self.sums.items()}


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Batches of labelled images; a `batchless.train.Data`.

    Attributes:
        train_images: images to learn from.
        test_images: images to evaluate on.
        image_size: S, the square that the network sees, in pixels.
        augment: what happens at random to a training image; None: nothing.
        statistics: by which images are normalized.
        seed: of order and augmentation.
        workers: processes that prepare batches; 0: this one.
    """

    train_images: ImageDataset
    test_images: ImageDataset
    image_size: int
    augment: Augment | None
    statistics: ChannelStatistics
    seed: int
    workers: int = 0

    @property
    def images_per_epoch(self) -> int:
        """Training images."""
        return len(self.train_images)

    def train(self, epoch: int, *, images_per_forward: int, images: int) -> Iterator[Batch]:
        """Micro-batches of the first `images` images of the epoch's order."""
        order = epoch_order(len(self.train_images), seed=self.seed, epoch=epoch)[:images]
        return batches(
            self.train_images,
            order,
            images_per_forward=images_per_forward,
            seed=self.seed,
            epoch=epoch,
            image_size=self.image_size,
            augment=self.augment,
            mean_std=self.statistics,
            workers=self.workers,
        )

    def test(self) -> Iterator[Batch]:
        """All test images, in order."""
        return batches(
            self.test_images,
            range(len(self.test_images)),
            images_per_forward=_EVALUATION_IMAGES_PER_FORWARD,
            seed=self.seed,
            epoch=0,
            image_size=self.image_size,
            augment=None,
            mean_std=self.statistics,
            workers=self.workers,
        )
