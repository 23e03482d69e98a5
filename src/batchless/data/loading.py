"""From a dataset and a plan of micro-batches to the tensors of a training or evaluation loop.

Every random number of a sample is a function of (seed, epoch, index in the dataset). So the samples do not depend on the
number of workers, the batch size or the position in the epoch, resuming skips indices instead of work, and the global
random state of torch, numpy and Python is neither read nor changed.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchless.data.augment import Augment, augmented, centred, erased_part
from batchless.data.dataset import ImageDataset, held_images
from batchless.data.mixing import Mix, mixed
from batchless.data.statistics import ChannelStatistics, normalized

Batch = TypeVar("Batch")

_MADE_TOGETHER_BYTES = 2**19
"""Of float32 images, and of the bytes that they are made of: so they stay in the nearer cache until they are used. A batch
takes some calls, however small it is."""


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
    micro_batches: Sequence[Sequence[int]],
    *,
    seed: int,
    epoch: int,
    image_size: int,
    augment: Augment | None,
    mean_std: ChannelStatistics,
    workers: int = 0,
    mix: Mix | None = None,
    resize_to: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch for each of `micro_batches`, in that order: float32 `[n, 3, S, S]` and labels int64 `[n]`.

    Args:
        dataset: where the images come from.
        micro_batches: for each batch the indices of its images, one or more.
        seed: of the samples, with `epoch`.
        epoch: of the samples, with `seed`.
        image_size: S.
        augment: what happens at random to each image. None is for evaluation: the shorter side is resized to S and the
            central square taken, unless the image is S x S already.
        mean_std: by which images are normalized.
        workers: processes that prepare batches; the values are the same. They end with the iterator.
        mix: blend each image with another one of the dataset. The labels are then probabilities, float32 `[n, classes]`.
        resize_to: for evaluation, the length of the shorter side before the central square is taken; None: S.

    Raises:
        ValueError: an argument out of range, at once; naming the image when its turn comes, if it cannot be read or if its
            label is not one of the classes; a worker was killed.
    """
    check_sizes(image_size=image_size, workers=workers, resize_to=resize_to)
    if mix is not None and len(dataset) < 2:
        raise ValueError("mix: there is no other image to blend with in a dataset of 1; train without mixup and cutmix")
    check_micro_batches(micro_batches, len(dataset))
    loader = _Batches(
        dataset,
        seed=seed,
        epoch=epoch,
        image_size=image_size,
        augment=augment,
        mean_std=mean_std,
        mix=mix,
        resize_to=resize_to,
    )
    if workers == 0 and loader.is_held():
        return loader.parts(micro_batches)
    return prepared(loader.batch, micro_batches, workers)


def check_sizes(*, image_size: int, workers: int, resize_to: int | None) -> None:
    """ValueError naming the setting that is out of range."""
    for name, value, least in (("image_size", image_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: give {least} or more")
    if resize_to is not None and resize_to < image_size:
        raise ValueError(
            f"resize_to={resize_to}: the square cut out of it has image_size={image_size}; give that or more"
        )


def check_micro_batches(micro_batches: Sequence[Sequence[int]], length: int) -> None:
    """ValueError naming the micro-batch if one is empty, or has an index that a dataset of `length` has not."""
    for number, indices in enumerate(micro_batches):
        if not indices:
            raise ValueError(f"micro-batch {number} of {len(micro_batches)} is empty: give each one or more indices")
        if min(indices) < 0 or max(indices) >= length:
            raise ValueError(
                f"micro-batch {number} has indices from {min(indices)} to {max(indices)} in a dataset of {length}:"
                " out of range"
            )


class _Batches:
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
        mix: Mix | None,
        resize_to: int | None,
    ) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.image_size, self.augment, self.mean_std = image_size, augment, mean_std
        self.mix, self.resize_to = mix, resize_to

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = self._images(indices), torch.tensor(labels_of(self.dataset, indices))
        if self.mix is None:
            return images, labels
        targets = F.one_hot(labels, len(self.dataset.classes)).float()
        for position, index in enumerate(indices):
            rng = self._rng("mix", index)
            partner = (index + 1 + rng.randrange(len(self.dataset) - 1)) % len(self.dataset)
            if blend := self.mix.draw(self.image_size, rng=rng):
                # The partner as it looks when its own turn comes in this epoch.
                images[position] = mixed(images[position], self._images([partner])[0], blend)
                targets[position] *= blend.share
                targets[position, labels_of(self.dataset, [partner])] += 1 - blend.share
        return images, targets

    def _images(self, indices: Sequence[int]) -> Tensor:
        images = normalized(self._squares(indices), self.mean_std)
        if self.augment is not None and self.augment.erasing:
            for image, index in zip(images, indices, strict=True):
                if part := erased_part(self.image_size, augment=self.augment, rng=self._rng("erase", index)):
                    top, left, height, width = part
                    image[:, top : top + height, left : left + width] = 0  # the mean colour
        return images

    def is_held(self) -> bool:
        """Whether images are in memory in one tensor as the network sees them, but not normalized."""
        return self.mix is None and self._held(()) is not None

    def parts(self, micro_batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """What `batch` gives for each of them, where `is_held()`; small ones are made together, at the price of one."""
        pixels = 3 * self.image_size**2
        for gathered in _joined_up_to(micro_batches, _MADE_TOGETHER_BYTES // pixels):
            indices = [index for each in gathered for index in each]
            squares, labels, begin = self._squares(indices), torch.tensor(labels_of(self.dataset, indices)), 0
            for together in _joined_up_to(gathered, _MADE_TOGETHER_BYTES // (4 * pixels)):
                sizes = [len(each) for each in together]
                end = begin + sum(sizes)
                images = normalized(squares[begin:end], self.mean_std)
                yield from zip(torch.split(images, sizes), torch.split(labels[begin:end], sizes), strict=True)
                begin = end

    def _held(self, indices: Sequence[int]) -> Tensor | None:
        if self.augment is not None or self.resize_to is not None:
            return None
        return held_images(self.dataset, indices, size=self.image_size)

    def _squares(self, indices: Sequence[int]) -> Tensor:
        held = self._held(indices)
        return torch.stack([self._square(index) for index in indices]) if held is None else held

    def _square(self, index: int) -> Tensor:
        image = self.dataset.image(index)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"{self.dataset.source(index)}: the dataset gives {image.dtype} {list(image.shape)} for this image;"
                " it must give torch.uint8 [3, height, width]"
            )
        if self.augment is None:
            return centred(image, self.image_size, resize_to=self.resize_to)
        # Python's generator: torch's keeps 32 bits of its seed only, and forking its global state takes 140 us a sample.
        rng = Random(f"{self.seed}/{self.epoch}/{index}")
        return augmented(image, self.image_size, augment=self.augment, rng=rng)

    def _rng(self, purpose: str, index: int) -> Random:
        """Random numbers of a sample that leave those of its augmentation as they are."""
        return Random(f"{purpose}/{self.seed}/{self.epoch}/{index}")


def _joined_up_to(micro_batches: Sequence[Sequence[int]], most: int) -> Iterator[Sequence[Sequence[int]]]:
    """Consecutive micro-batches with at most so many indices together, or one that has more.

    >>> list(_joined_up_to([[0], [1], [2, 3], [4, 5, 6]], 2))
    [[[0], [1]], [[2, 3]], [[4, 5, 6]]]
    """
    begin = count = 0
    for end, indices in enumerate(micro_batches):
        if end > begin and count + len(indices) > most:
            yield micro_batches[begin:end]
            begin, count = end, 0
        count += len(indices)
    if begin < len(micro_batches):
        yield micro_batches[begin:]


class Labelled(Protocol):
    """What datasets of images and of clips have in common."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""

    def label(self, index: int) -> int:
        """The index of the sample's class in `classes`."""

    def source(self, index: int) -> str:
        """Names the sample in errors."""


def labels_of(dataset: Labelled, indices: Sequence[int]) -> list[int]:
    """The labels of one or more samples; ValueError naming the first that has one of no class."""
    labels, classes = [dataset.label(index) for index in indices], len(dataset.classes)
    if min(labels) < 0 or max(labels) >= classes:
        index, label = next(pair for pair in zip(indices, labels, strict=True) if not 0 <= pair[1] < classes)
        raise ValueError(
            f"{dataset.source(index)}: label {label} is out of range, there are {classes} classes"
            f" (0 to {classes - 1}); correct the label, or list its class"
        )
    return labels


def prepared(
    make: Callable[[Sequence[int]], Batch], micro_batches: Sequence[Sequence[int]], workers: int
) -> Iterator[Batch]:
    """`make(indices)` for each micro-batch, in order; the values do not depend on who makes them.

    Args:
        make: a function that processes can be given.
        micro_batches: the lists.
        workers: processes of their own that make them and end with the iterator; 0: this one.

    Raises:
        ValueError: as `make` says, or a worker was killed.
    """
    return _in_workers(make, micro_batches, workers) if workers else map(make, micro_batches)


class _Told(Dataset["Batch | str"], Generic[Batch]):
    """A batch, or the text of the ValueError: DataLoader would wrap an exception in the worker's traceback."""

    def __init__(self, make: Callable[[Sequence[int]], Batch]) -> None:
        self.make = make

    def __getitem__(self, indices: Sequence[int]) -> Batch | str:
        try:
            return self.make(indices)
        except ValueError as error:
            return str(error)


def _in_workers(
    make: Callable[[Sequence[int]], Batch], micro_batches: Sequence[Sequence[int]], workers: int
) -> Iterator[Batch]:
    # With a generator of its own, DataLoader leaves the global random state alone; nothing here draws from its seeds.
    items = DataLoader(
        _Told(make),
        batch_size=None,
        sampler=micro_batches,
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        worker_init_fn=_ignore_interrupts,
    )
    # No name for its iterator, which ends the workers when nothing refers to it: when this generator ends or is dropped.
    try:
        for item in items:
            if isinstance(item, str):
                raise ValueError(item)
            yield item
    except (RuntimeError, OSError, EOFError) as error:
        if not _is_of_a_dead_worker(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"a process that prepares batches ended ({reason}): use fewer workers, or workers=0"
        ) from error


def _is_of_a_dead_worker(error: Exception) -> bool:
    """Whether it says that a worker was killed, or that the tensors it had announced cannot be fetched any more.

    An exception that the dataset raises in a worker has the same type here, and a text that begins with "Caught".
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return isinstance(error, ConnectionError | EOFError | FileNotFoundError) and not str(error).startswith("Caught")


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal: the parent decides, and may still need batches until the end of a step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(item: object) -> object:
    return item
