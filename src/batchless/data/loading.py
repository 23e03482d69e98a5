"""From a dataset and an order of indices to the batches of a training or evaluation loop.

Every random number of a sample is a function of (seed, epoch, index in the dataset). So the samples do not depend on the
number of workers, the batch size or the position in the epoch, resuming skips indices instead of work, and the global
random state of torch, numpy and Python is neither read nor changed.
"""

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchless.data.augment import Augment, augmented, centred
from batchless.data.dataset import ImageDataset
from batchless.data.statistics import ChannelStatistics, normalized


def epoch_order(length: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the images in an epoch: a permutation of `range(length)`, a function of (length, seed, epoch).

    >>> epoch_order(6, seed=0, epoch=2)
    [2, 0, 3, 5, 4, 1]
    """
    order = list(range(length))
    Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def batches(
    dataset: ImageDataset,
    indices: Sequence[int],
    *,
    images_per_forward: int,
    seed: int,
    epoch: int,
    image_size: int,
    augment: Augment | None,
    mean_std: ChannelStatistics,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the images at `indices`, in that order: float32 `[n, 3, S, S]` and labels int64 `[n]`.

    `n` is `images_per_forward`, and what is left in the last batch; nothing is dropped. `S` is `image_size`. `augment=None`
    is for evaluation: the shorter side is resized to S and the central square taken, unless the image is S x S already.
    With `workers` above 0, that many processes prepare the batches; the values are the same.

    ValueError if an argument is out of range, and, when its turn comes, naming the image if it cannot be read or if its
    label is not one of the classes.
    """
    for name, value, least in (
        ("images_per_forward", images_per_forward, 1),
        ("image_size", image_size, 1),
        ("workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: give {least} or more")
    if indices and (min(indices) < 0 or max(indices) >= len(dataset)):
        raise ValueError(f"indices from {min(indices)} to {max(indices)} in a dataset of {len(dataset)}: out of range")
    loader = _Batches(dataset, seed=seed, epoch=epoch, image_size=image_size, augment=augment, mean_std=mean_std)
    parts = [indices[start : start + images_per_forward] for start in range(0, len(indices), images_per_forward)]
    return _in_workers(loader, parts, workers) if workers else (loader.batch(part) for part in parts)


class _Batches(Dataset["tuple[Tensor, Tensor] | str"]):
    """Batches by their lists of indices; what a worker process holds."""

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        seed: int,
        epoch: int,
        image_size: int,
        augment: Augment | None,
        mean_std: ChannelStatistics,
    ) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.image_size, self.augment, self.mean_std = image_size, augment, mean_std

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = normalized(torch.stack([self._image(index) for index in indices]), self.mean_std)
        return images, torch.tensor([self._label(index) for index in indices])

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | str:
        try:
            return self.batch(indices)
        except ValueError as error:
            # DataLoader would wrap an exception in the worker's traceback: the message travels as a value instead.
            return str(error)

    def _image(self, index: int) -> Tensor:
        image = self.dataset.image(index)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"{self.dataset.source(index)}: the dataset gives {image.dtype} {list(image.shape)} for this image;"
                " it must give torch.uint8 [3, height, width]"
            )
        if self.augment is None:
            return centred(image, self.image_size)
        # Python's generator: torch's keeps 32 bits of its seed only, and forking its global state takes 140 us a sample.
        rng = Random(f"{self.seed}/{self.epoch}/{index}")
        return augmented(image, self.image_size, augment=self.augment, rng=rng)

    def _label(self, index: int) -> int:
        label, classes = self.dataset.label(index), len(self.dataset.classes)
        if not 0 <= label < classes:
            raise ValueError(
                f"{self.dataset.source(index)}: label {label} is out of range, there are {classes} classes"
                f" (0 to {classes - 1}); correct the label, or list its class"
            )
        return label


def _in_workers(loader: _Batches, parts: list[Sequence[int]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    # With a generator of its own, DataLoader leaves the global random state alone; nothing here draws from its seeds.
    items = DataLoader(
        loader,
        batch_size=None,
        sampler=parts,
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    for item in items:
        if isinstance(item, str):
            raise ValueError(item)
        yield item


def _unchanged(item: object) -> object:
    return item
