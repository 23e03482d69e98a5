"""What a dataset is, and opening one in whichever layout it lies on disk."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, Protocol

from torch import Tensor

from batchless.data.cifar import find_cifar, open_cifar
from batchless.data.folders import existing_folder, held_out_folder, open_folders
from batchless.data.handwriting import handwriting
from batchless.data.idx import holds_idx, open_idx
from batchless.data.memory import TensorImages

LAYOUTS = (
    "CIFAR pickles (cifar-10-batches-py/ or cifar-100-python/, or such a folder itself)",
    "IDX files (train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-...)",
    "image folders (train/<class>/*.jpg and test/<class>/*.jpg, or val/ or valid/ for test/)",
)


class ImageDataset(Protocol):
    """Labelled images by index; datasets hold no random numbers, which come with `batches`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """The image as uint8 `[3, H, W]`, not to be written to; ValueError naming it if it cannot be read."""

    def label(self, index: int) -> int:
        """The index of the image's class in `classes`."""

    def source(self, index: int) -> str:
        """Names the image in errors: a path, or words such as "handwriting test 17"."""


def open_images(root: str | Path | None, split: Literal["train", "test"]) -> ImageDataset:
    """The images of a split of the dataset in `root`, whose layout is detected; None is the embedded handwriting.

    Layouts, in the order in which they are looked for: CIFAR pickles, IDX files (MNIST, Fashion-MNIST), image folders with
    a folder for each class. With image folders, the test images are those in `test/`, else in `val/`, else in `valid/`.
    ValueError, with the path and what is possible, if the folder is missing, in no known layout, or in disorder.

    >>> images = open_images(None, "test")
    >>> len(images), images.classes[images.label(17)], images.source(17)
    (1080, '0', 'handwriting test 17')
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: there are 'train' and 'test'")
    if root is None:
        return handwriting(split)
    root = existing_folder(root, holding=LAYOUTS)
    if cifar := find_cifar(root):
        return open_cifar(cifar, split)
    if holds_idx(root):
        return open_idx(root, split)
    if (root / "train").is_dir() and held_out_folder(root):
        return open_folders(root, split)
    raise ValueError(f"{root} holds no known layout; possible are {'; or '.join(LAYOUTS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Subset:
    """Some images of a dataset, in a given order; index i of the subset is image `indices[i]` of the dataset."""

    dataset: ImageDataset
    indices: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the dataset, all of them."""
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Tensor:
        """The image as uint8 `[3, H, W]`."""
        return self.dataset.image(self.indices[index])

    def label(self, index: int) -> int:
        """The index of the image's class in `classes`."""
        return self.dataset.label(self.indices[index])

    def source(self, index: int) -> str:
        """Where the image comes from, as the dataset says."""
        return self.dataset.source(self.indices[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledImages:
    """The images of several datasets, one after the other."""

    parts: tuple[ImageDataset, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the first, which are those of all."""
        return self.parts[0].classes

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def image(self, index: int) -> Tensor:
        """The image as uint8 `[3, H, W]`."""
        part, own = self._find(index)
        return part.image(own)

    def label(self, index: int) -> int:
        """The index of the image's class in `classes`."""
        part, own = self._find(index)
        return part.label(own)

    def source(self, index: int) -> str:
        """Where the image comes from, as its dataset says."""
        part, own = self._find(index)
        return part.source(own)

    def _find(self, index: int) -> tuple[ImageDataset, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def held_images(dataset: ImageDataset, indices: Sequence[int], *, size: int) -> Tensor | None:
    """Several images at once, uint8 `[len(indices), 3, size, size]`, where they lie like that in one tensor; None elsewhere."""
    if isinstance(dataset, Subset):
        return held_images(dataset.dataset, [dataset.indices[index] for index in indices], size=size)
    # Exactly this type: another one may make its images in its own way.
    if type(dataset) is TensorImages and dataset.images.shape[-2:] == (size, size):
        return dataset.images_of(indices)
    return None


def first_images(dataset: ImageDataset, n: int, *, seed: int) -> Subset:
    """The first n images of a seeded order in which every beginning has the classes in proportion.

    The order begins with one image of every class; a smaller n with the same seed gives the beginning of a larger one, so
    studies on growing parts of a dataset are nested. ValueError if n exceeds the dataset or leaves a class without image.

    >>> part = first_images(open_images(None, "test"), 20, seed=0)
    >>> sorted(part.label(index) for index in range(20))
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    """
    return Subset(
        dataset=dataset, indices=first_indices([dataset.label(index) for index in range(len(dataset))], n, seed=seed)
    )


def first_indices(labels: Sequence[int], n: int, *, seed: int) -> tuple[int, ...]:
    """What `first_images` takes, by the labels of the samples alone."""
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    if not len(members) <= n <= len(labels):
        raise ValueError(
            f"n={n} images: the dataset has {len(labels)} in {len(members)} classes; give {len(members)} to {len(labels)}"
        )
    rng = Random(f"first/{seed}")
    ranked = []
    for label in sorted(members):
        rng.shuffle(members[label])
        for rank, index in enumerate(members[label]):
            # The share of its class used up with this image; the random number breaks ties.
            share = (rank + 1) / len(members[label]) if rank else 0.0
            ranked.append((share, rng.random(), index))
    return tuple(index for _, _, index in sorted(ranked)[:n])
