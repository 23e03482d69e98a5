"""The task of detection and its data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from batchless.data.object_loading import ObjectAugment, Sample, grouped_order, object_batches
from batchless.data.objects import DetectionImages
from batchless.tasks.detect.average_precision import AveragePrecision
from batchless.tasks.detect.pictures import write_detections

Batch = list[Sample]


@dataclass(frozen=True, kw_only=True)
class DetectionData:
    """Batches of images with objects; a `batchless.train.Data`.

    Attributes:
        train_images: images to learn from.
        test_images: images to evaluate on.
        augment: what happens at random to a training image.
        images_per_forward: by which the order groups images of one orientation.
        masks: whether the detector learns masks.
        seed: of order and augmentation.
        workers: processes that prepare batches; 0: this one.
    """

    train_images: DetectionImages
    test_images: DetectionImages
    augment: ObjectAugment
    images_per_forward: int
    masks: bool
    seed: int
    workers: int = 0

    def order(self, epoch: int) -> Sequence[int]:
        """The training images in the order in which the epoch shows them, each forward's of one orientation."""
        wide = [image.width > image.height for image in self.train_images.images]
        return grouped_order(wide, images_per_forward=self.images_per_forward, seed=self.seed, epoch=epoch)

    def train(self, epoch: int, micro_batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """A batch for each list of training images."""
        return object_batches(
            self.train_images,
            micro_batches,
            seed=self.seed,
            epoch=epoch,
            augment=self.augment,
            masks=self.masks,
            workers=self.workers,
        )

    @property
    def test_images_count(self) -> int:
        """Test images."""
        return len(self.test_images)

    def test(self, part: range) -> Iterator[Batch]:
        """The test images in `part`, in order, one at a time: batched, they would be padded to another size."""
        return object_batches(
            self.test_images,
            [[index] for index in part],
            seed=self.seed,
            epoch=0,
            augment=None,
            masks=self.masks,
            workers=self.workers,
        )


@dataclass(kw_only=True)
class Detect:
    """A detector's own losses and COCO's AP; a `batchless.train.Task`.

    Attributes:
        data: whose test images are evaluated and pictured.
    """

    data: DetectionData

    @property
    def main_figure(self) -> str:
        """`ap` of boxes."""
        return "ap"

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The sum over the batch's images of the detector's losses, and the number of images.

        torchvision averages its losses over a batch; so with one image per forward the step is exactly the mean of the images'
        losses.
        """
        losses = model([sample.image for sample in batch], [target(sample) for sample in batch])
        total: Tensor = sum(losses.values())
        return total * len(batch), len(batch)

    def images(self, batch: Batch) -> int:
        """Number of images."""
        return len(batch)

    def metric(self) -> AveragePrecision:
        """COCO's AP."""
        return AveragePrecision(classes=len(self.data.test_images.classes), masks=self.data.masks)

    def to(self, batch: Batch, device: str) -> Batch:
        """The batch on the device."""
        return [
            replace(
                sample,
                image=sample.image.to(device, non_blocking=True),
                boxes=sample.boxes.to(device, non_blocking=True),
                labels=sample.labels.to(device, non_blocking=True),
                masks=None if sample.masks is None else sample.masks.to(device, non_blocking=True),
            )
            for sample in batch
        ]

    def picture(self, metric: AveragePrecision, folder: Path) -> None:
        """Pictures of the worst and of typical images, the truth beside what was found."""
        write_detections(folder, metric.results, self.data.test_images)


def target(sample: Sample) -> dict[str, Tensor]:
    """What torchvision's detectors learn from: class 0 is their background, so that labels begin with 1."""
    wanted = {"boxes": sample.boxes, "labels": sample.labels + 1}
    return wanted if sample.masks is None else {**wanted, "masks": sample.masks}
