"""Classification of single images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from batchless.data import Augment, ChannelStatistics, ImageDataset, Mix, batches, epoch_order
from batchless.tasks.accuracy import Accuracy
from batchless.tasks.pictures import write_predictions

Batch = tuple[Tensor, Tensor]
"""Images `[N, 3, S, S]` and labels `[N]`, or the probabilities of the classes `[N, classes]`."""

_EVALUATION_IMAGES_PER_FORWARD = 64


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Batches of labelled images; a `batchless.train.Data`.

    Attributes:
        train_images: images to learn from.
        test_images: images to evaluate on.
        image_size: S, the square that the network sees, in pixels.
        augment: what happens at random to a training image; None: nothing.
        mix: how training images are blended in pairs; None: not.
        resize_to: the shorter side of a test image before its central square is taken; None: S.
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
    mix: Mix | None = None
    resize_to: int | None = None
    workers: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.train_images.classes

    def order(self, epoch: int) -> Sequence[int]:
        """The training images in the order in which the epoch shows them."""
        return epoch_order(len(self.train_images), seed=self.seed, epoch=epoch)

    def train(self, epoch: int, micro_batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """A batch for each list of training images."""
        return batches(
            self.train_images,
            micro_batches,
            seed=self.seed,
            epoch=epoch,
            image_size=self.image_size,
            augment=self.augment,
            mean_std=self.statistics,
            workers=self.workers,
            mix=self.mix,
        )

    @property
    def test_images_count(self) -> int:
        """Test images."""
        return len(self.test_images)

    def test(self, part: range) -> Iterator[Batch]:
        """The test images in `part`, in order."""
        size = _EVALUATION_IMAGES_PER_FORWARD
        return batches(
            self.test_images,
            [part[at : at + size] for at in range(0, len(part), size)],
            seed=self.seed,
            epoch=0,
            image_size=self.image_size,
            augment=None,
            mean_std=self.statistics,
            workers=self.workers,
            resize_to=self.resize_to,
        )


@dataclass(kw_only=True)
class Classify:
    """Cross-entropy and accuracy; a `batchless.train.Task`.

    Attributes:
        data: whose test images are pictured with their predictions; None: no pictures.
        label_smoothing: share of a label that is spread evenly over all classes.
    """

    data: ImageData | None = None
    label_smoothing: float = 0.0

    @property
    def main_figure(self) -> str:
        """`accuracy`."""
        return "accuracy"

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Summed cross-entropy, and the number of images."""
        images, labels = batch
        loss = F.cross_entropy(model(images), labels, reduction="sum", label_smoothing=self.label_smoothing)
        return loss, len(labels)

    def images(self, batch: Batch) -> int:
        """Number of images."""
        return len(batch[1])

    def metric(self) -> Accuracy:
        """Accuracy and loss."""
        return Accuracy()

    def to(self, batch: Batch, device: str) -> Batch:
        """The batch on the device."""
        return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)

    def picture(self, metric: Accuracy, folder: Path) -> None:
        """Pictures of the worst and of typical predictions."""
        if self.data is not None:
            found, data = metric.per_image(), self.data
            write_predictions(folder, found, data.test_images, image_size=data.image_size)
