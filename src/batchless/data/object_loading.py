"""From annotated images and a plan of micro-batches to a detector's images and targets.

As in `loading.py`, every random number of a sample is a function of (seed, epoch, index).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask

from batchless.data.loading import epoch_order, prepared
from batchless.data.objects import AnnotatedImage, DetectionImages


@dataclass(frozen=True, kw_only=True)
class ObjectAugment:
    """What happens at random to a training image, its boxes and its masks together.

    Attributes:
        shorter_sides: pixels; one is drawn for each image, and the image resized so that its shorter side has that length.
        longest_side: pixels; where the longer side would exceed it, the image becomes smaller instead.
        flip: mirror every second image, by chance; not for digits or letters.
    """

    shorter_sides: tuple[int, ...] = (800,)
    longest_side: int = 1333
    flip: bool = True

    def __post_init__(self) -> None:
        if not self.shorter_sides or min(self.shorter_sides) < 1:
            raise ValueError(f"shorter_sides={list(self.shorter_sides)}: give one or more lengths of 1 pixel or more")
        if self.longest_side < max(self.shorter_sides):
            raise ValueError(
                f"longest_side={self.longest_side}: give {max(self.shorter_sides)} or more, the largest shorter side"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """An image as a detector gets it, and what is to be learned of it, or to be compared with.

    Attributes:
        image: float32 `[3, H, W]` from 0 to 1; detectors normalize it themselves.
        boxes: float32 `[n, 4]`: left, top, right, bottom in pixels of `image`.
        labels: int64 `[n]`, from 0.
        masks: uint8 `[n, H, W]`, or None.
        index: of the image in the data set.
        known: for evaluation, everything that is known of the image; None in training.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    index: int
    known: AnnotatedImage | None = None


def resized_size(height: int, width: int, *, shorter_side: int, longest_side: int) -> tuple[int, int]:
    """Height and width after resizing: the shorter side as asked, or less where the longer one would exceed its limit.

    >>> resized_size(480, 640, shorter_side=240, longest_side=1000), resized_size(480, 640, shorter_side=480, longest_side=320)
    ((240, 320), (240, 320))
    """
    scale = min(shorter_side / min(height, width), longest_side / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def augmented_objects(
    image: Tensor, boxes: Tensor, masks: Tensor | None, *, augment: ObjectAugment, rng: Random
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A random view of an image uint8 `[3, H, W]` with boxes `[n, 4]` and masks `[n, H, W]`: a function of the arguments."""
    # Drawn first, so that the same images are mirrored whatever the other settings are.
    mirrored = augment.flip and rng.random() < 0.5
    height, width = image.shape[1:]
    side = rng.choice(augment.shorter_sides)
    size = list(resized_size(height, width, shorter_side=side, longest_side=augment.longest_side))
    marked = BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
    outlines = None if masks is None else Mask(masks)
    if size != [height, width]:
        image = functional.resize(image, size, antialias=True)
        marked = functional.resize(marked, size)
        outlines = None if outlines is None else functional.resize(outlines, size)
    if mirrored:
        image, marked = functional.horizontal_flip(image), functional.horizontal_flip(marked)
        outlines = None if outlines is None else functional.horizontal_flip(outlines)
    return image, marked.as_subclass(Tensor), None if outlines is None else outlines.as_subclass(Tensor)


def object_batches(
    dataset: DetectionImages,
    micro_batches: Sequence[Sequence[int]],
    *,
    seed: int,
    epoch: int,
    augment: ObjectAugment | None,
    masks: bool,
    workers: int = 0,
) -> Iterator[list[Sample]]:
    """The samples of each of `micro_batches`, in that order.

    Args:
        dataset: where the images come from.
        micro_batches: for each batch the indices of its images.
        seed: of the samples, with `epoch`.
        epoch: of the samples, with `seed`.
        augment: what happens at random to each training image; crowds are left out. None is for evaluation: the images as
            they are, each with what is known of it.
        masks: whether the training images' masks are wanted.
        workers: processes that prepare batches; the values are the same.

    Raises:
        ValueError: naming the image when its turn comes, if it cannot be read, has another size than annotated, or a mask
            is damaged; a worker was killed.
    """
    loader = _Samples(dataset, seed=seed, epoch=epoch, augment=augment, masks=masks)
    return prepared(loader.batch, micro_batches, workers)


class _Samples:
    """Batches by their lists of indices; what a worker process holds."""

    def __init__(
        self, dataset: DetectionImages, *, seed: int, epoch: int, augment: ObjectAugment | None, masks: bool
    ) -> None:
        self.dataset, self.seed, self.epoch, self.augment, self.masks = dataset, seed, epoch, augment, masks

    def batch(self, indices: Sequence[int]) -> list[Sample]:
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Sample:
        known = self.dataset.images[index]
        if self.augment is None:
            image, boxes, masks = known.image(), known.boxes, None
        else:
            known = known.only(~known.crowd)
            rng = Random(f"objects/{self.seed}/{self.epoch}/{index}")
            masks = known.masks() if self.masks else None
            image, boxes, masks = augmented_objects(known.image(), known.boxes, masks, augment=self.augment, rng=rng)
        return Sample(
            image=functional.to_dtype(image, torch.float32, scale=True),
            boxes=boxes,
            labels=known.labels,
            masks=masks,
            index=index,
            known=known.without_image() if self.augment is None else None,
        )


def grouped_order(wide: Sequence[bool], *, images_per_forward: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch in which each forward's images have one orientation, so that less of a batch is padding.

    A permutation of the images, a function of the arguments alone. Cut into pieces of `images_per_forward`, each piece has
    wide images or tall ones only, but for the pieces at the end, which take what is left of both. With one image per
    forward it is `epoch_order`.

    Args:
        wide: of each image, whether its width exceeds its height.
        images_per_forward: images in a piece.
        seed: of the order, with `epoch`.
        epoch: of the order, with `seed`.

    >>> grouped_order([True, False, True, False, True], images_per_forward=2, seed=0, epoch=0)
    [4, 2, 1, 3, 0]
    """
    order: list[int] = []
    waiting: dict[bool, list[int]] = {True: [], False: []}
    for index in epoch_order(len(wide), seed=seed, epoch=epoch):
        piece = waiting[wide[index]]
        piece.append(index)
        if len(piece) == images_per_forward:
            order += piece
            piece.clear()
    return order + waiting[True] + waiting[False]
