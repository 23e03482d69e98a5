"""The task of segmentation and its data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from batchless.data import ChannelStatistics, epoch_order
from batchless.data.label_maps import IGNORED, LabelMaps
from batchless.data.map_loading import MapAugment, MapBatch, map_batches
from batchless.tasks.segment.confusion import Confusion
from batchless.tasks.segment.pictures import write_label_maps


@dataclass(frozen=True, kw_only=True)
class SegmentationData:
    """Batches of images with label maps; a `batchless.train.Data`.

    Attributes:
        train_images: images to learn from.
        test_images: images to evaluate on.
        augment: sizes, and what happens at random to a training image.
        statistics: by which images are normalized.
        seed: of order and augmentation.
        workers: processes that prepare batches; 0: this one.
    """

    train_images: LabelMaps
    test_images: LabelMaps
    augment: MapAugment
    statistics: ChannelStatistics
    seed: int
    workers: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.train_images.classes

    def order(self, epoch: int) -> Sequence[int]:
        """The training images in the order in which the epoch shows them."""
        return epoch_order(len(self.train_images), seed=self.seed, epoch=epoch)

    def train(self, epoch: int, micro_batches: Sequence[Sequence[int]]) -> Iterator[MapBatch]:
        """A batch for each list of training images."""
        return self._batches(self.train_images, micro_batches, epoch=epoch, training=True)

    @property
    def test_images_count(self) -> int:
        """Test images."""
        return len(self.test_images)

    def test(self, part: range) -> Iterator[MapBatch]:
        """The test images in `part`, in order and whole, one at a time, as their sizes may differ."""
        return self._batches(self.test_images, [[index] for index in part], epoch=0, training=False)

    def _batches(
        self, images: LabelMaps, micro_batches: Sequence[Sequence[int]], *, epoch: int, training: bool
    ) -> Iterator[MapBatch]:
        return map_batches(
            images,
            micro_batches,
            seed=self.seed,
            epoch=epoch,
            augment=self.augment,
            training=training,
            mean_std=self.statistics,
            workers=self.workers,
        )


@dataclass(kw_only=True)
class Segment:
    """Cross-entropy of the valid pixels and mIoU; a `batchless.train.Task` that counts pixels.

    Attributes:
        data: whose test images are evaluated and pictured.
        label_smoothing: share of a label that is spread evenly over all classes.
    """

    data: SegmentationData
    label_smoothing: float = 0.0

    @property
    def main_figure(self) -> str:
        """`miou`."""
        return "miou"

    def loss(self, model: nn.Module, batch: MapBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the valid pixels, and their number: 0 and 0 where all are ignored."""
        loss = F.cross_entropy(
            model(batch.images),
            batch.labels.long(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return loss, (batch.labels != IGNORED).sum()

    def images(self, batch: MapBatch) -> int:
        """Number of images."""
        return len(batch.images)

    def metric(self) -> Confusion:
        """mIoU, pixel accuracy and loss."""
        return Confusion(classes=len(self.data.classes))

    def to(self, batch: MapBatch, device: str) -> MapBatch:
        """The batch on the device; indices stay."""
        return batch._replace(
            images=batch.images.to(device, non_blocking=True), labels=batch.labels.to(device, non_blocking=True)
        )

    def picture(self, metric: Confusion, folder: Path) -> None:
        """Pictures of the worst and of typical images: the image, the truth, the prediction."""
        write_label_maps(folder, metric.mapped, self.data.test_images)
