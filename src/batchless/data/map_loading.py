"""From images with label maps and a plan of micro-batches to the tensors of a training or evaluation loop.

As in `loading.py`, every random number of a sample is a function of (seed, epoch, index).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from batchless.data.label_maps import IGNORED, LabelMaps
from batchless.data.loading import check_micro_batches, prepared
from batchless.data.statistics import ChannelStatistics, normalized


class MapBatch(NamedTuple):
    """Images and their labels.

    Attributes:
        images: float32 `[N, 3, h, w]`, normalized.
        labels: uint8 `[N, H, W]`, 255 where ignored. In evaluation of the map's own size, to which scores are resized.
        indices: int64 `[N]`, of the images in the data set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True, kw_only=True)
class MapAugment:
    """How an image and its label map are resized, and what happens to both at random in training.

    Attributes:
        shorter_side: the length, in pixels, to which an image is resized, in evaluation too; None: as it is stored.
        scales: smallest and largest factor of that size in training, uniform in its logarithm.
        crop: height and width of a random part in training; where the image is smaller, pixels of the mean colour are added
            below and to the right, which are ignored. None: the whole image.
        flip: mirror every second image, by chance; not for digits or letters.
    """

    shorter_side: int | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        if self.shorter_side is not None and self.shorter_side < 1:
            raise ValueError(f"shorter_side={self.shorter_side}: give 1 pixel or more, or null")
        if len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1] < math.inf:
            raise ValueError(f"scales={list(self.scales)}: give two factors, 0 < smallest <= largest")
        if self.crop is not None and (len(self.crop) != 2 or min(self.crop) < 1):
            raise ValueError(f"crop={list(self.crop)}: give height and width of 1 pixel or more, or null")

    def size(self, height: int, width: int, *, factor: float = 1.0) -> tuple[int, int]:
        """Height and width after resizing.

        >>> MapAugment(shorter_side=120).size(360, 480), MapAugment().size(361, 480, factor=0.5)
        ((120, 160), (180, 240))
        """
        scale = factor if self.shorter_side is None else factor * self.shorter_side / min(height, width)
        return max(round(height * scale), 1), max(round(width * scale), 1)


def augmented_map(image: Tensor, labels: Tensor, *, augment: MapAugment, rng: Random) -> tuple[Tensor, Tensor]:
    """A random view of an image uint8 `[3, H, W]` with its labels uint8 `[H, W]`: a function of the arguments.

    Args:
        image: the image.
        labels: of its pixels.
        augment: what happens.
        rng: of the view; four numbers are drawn, whatever the settings are.

    Returns:
        The view as far as the image reaches, uint8 `[3, h, w]` with h and w at most the crop's, and its labels `[h, w]`.
    """
    draws = [rng.random() for _ in range(4)]
    smallest, largest = (math.log(scale) for scale in augment.scales)
    factor = math.exp(smallest + (largest - smallest) * draws[0])
    height, width = augment.size(*labels.shape, factor=factor)
    if (height, width) != tuple(labels.shape):
        image, labels = resized_image(image, height, width), _resized_labels(labels, height, width)
    if augment.crop is not None:
        rows, columns = (min(side, length) for side, length in zip(augment.crop, (height, width), strict=True))
        top, left = int(draws[1] * (height - rows + 1)), int(draws[2] * (width - columns + 1))
        image, labels = (part[..., top : top + rows, left : left + columns] for part in (image, labels))
    if augment.flip and draws[3] < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    return image, labels


def resized_image(image: Tensor, height: int, width: int) -> Tensor:
    """An image uint8 `[3, H, W]` in another size."""
    result: Tensor = functional.resize(image, [height, width], antialias=True)
    return result


def _resized_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Labels `[H, W]` in another size, each the one nearest to the middle of the new pixel."""
    result: Tensor = functional.resize(labels[None], [height, width], interpolation=InterpolationMode.NEAREST_EXACT)
    return result[0]


def map_batches(
    dataset: LabelMaps,
    micro_batches: Sequence[Sequence[int]],
    *,
    seed: int,
    epoch: int,
    augment: MapAugment,
    training: bool,
    mean_std: ChannelStatistics,
    workers: int = 0,
) -> Iterator[MapBatch]:
    """The images of each of `micro_batches`, in that order.

    Args:
        dataset: where they come from.
        micro_batches: for each batch the indices of its images.
        seed: of the samples, with `epoch`.
        epoch: of the samples, with `seed`.
        augment: sizes, and what happens at random.
        training: whether it does happen; else whole images, and labels in the size of the maps.
        mean_std: by which images are normalized.
        workers: processes that prepare batches; the values are the same.

    Raises:
        ValueError: naming the file when its turn comes (see `LabelMaps.sample`); images of several sizes in a batch; a worker
            was killed.
    """
    check_micro_batches(micro_batches, len(dataset))
    loader = _Maps(dataset, seed=seed, epoch=epoch, augment=augment, training=training, mean_std=mean_std)
    return prepared(loader.batch, micro_batches, workers)


class _Maps:
    """Batches by their lists of indices; what a worker process holds."""

    def __init__(
        self,
        dataset: LabelMaps,
        *,
        seed: int,
        epoch: int,
        augment: MapAugment,
        training: bool,
        mean_std: ChannelStatistics,
    ) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.augment, self.training, self.mean_std = augment, training, mean_std

    def batch(self, indices: Sequence[int]) -> MapBatch:
        samples = [self._sample(index) for index in indices]
        sizes = {tuple(image.shape[1:]) for image, _ in samples}
        if len(sizes) > 1:
            (height, width), (other_height, other_width), *_ = sorted(sizes)
            raise ValueError(
                f"{self.dataset.source(indices[0])} and others of its forward are {width}x{height} and {other_width}x"
                f"{other_height} pixels: set segment.crop, or images_per_forward=1"
            )
        images, labels = (torch.stack(parts) for parts in zip(*samples, strict=True))
        return MapBatch(images=images, labels=labels, indices=torch.tensor(indices))

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.dataset.sample(index)
        if not self.training:
            return evaluated_image(image, self.augment, self.mean_std), labels
        rng = Random(f"maps/{self.seed}/{self.epoch}/{index}")
        image, labels = augmented_map(image, labels, augment=self.augment, rng=rng)
        floats = normalized(image, self.mean_std)
        if self.augment.crop is None:
            return floats, labels
        below, right = (side - length for side, length in zip(self.augment.crop, labels.shape, strict=True))
        # 0 is the mean colour.
        return F.pad(floats, (0, right, 0, below)), F.pad(labels, (0, right, 0, below), value=IGNORED)


def evaluated_image(image: Tensor, augment: MapAugment, mean_std: ChannelStatistics) -> Tensor:
    """An image uint8 `[3, H, W]` as the network sees it in evaluation: float32 `[3, h, w]`."""
    size = augment.size(*image.shape[1:])
    if size != tuple(image.shape[1:]):
        image = resized_image(image, *size)
    return normalized(image, mean_std)
