"""A domain's images before they are split, and the split that FedBN and FedWon make of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from batchless.data.dataset import ImageDataset, Subset

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainImages:
    """Images of one domain as they lie on disk.

    Attributes:
        images: of the asked split, or all of them.
        is_split: whether the data come with a split of their own, so that `images` are one part of it.
    """

    images: ImageDataset
    is_split: bool


def stratified_part(images: ImageDataset, split: Split, *, domain: str, test_share: float, seed: int) -> Subset:
    """The training or test part by scikit-learn's `StratifiedShuffleSplit`, in its order, which is random.

    ValueError naming the domain if a class is too small for both parts.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = np.array([images.label(index) for index in range(len(images))])
    counts = np.bincount(labels, minlength=len(images.classes))
    if len(labels) and (rare := int(counts.argmin())) >= 0 and counts[rare] == 1:
        raise ValueError(
            f"domain {domain!r}: class {images.classes[rare]!r} has 1 image, a split into training and test needs 2"
            " or more of each class: add images, or leave the class out"
        )
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=test_share, random_state=seed)
    try:
        train, test = next(splitter.split(np.zeros(len(labels)), labels))
    except ValueError as error:
        raise ValueError(
            f"domain {domain!r}: {len(labels)} images cannot be split with test_share={test_share}"
            f" ({' '.join(str(error).split())}): add images, or choose another share"
        ) from error
    return Subset(dataset=images, indices=tuple((train if split == "train" else test).tolist()))


@dataclass(frozen=True, kw_only=True, eq=False)
class _SomeClasses:
    """The images of some classes of a dataset, with labels by their place among these classes."""

    dataset: ImageDataset
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Tensor:
        return self.dataset.image(self.indices[index])

    def label(self, index: int) -> int:
        return self.labels[index]

    def source(self, index: int) -> str:
        return self.dataset.source(self.indices[index])


def of_classes(images: ImageDataset, classes: Sequence[str], *, domain: str) -> ImageDataset:
    """The images of these classes only, in the order of `images`; labels follow the order of `classes`.

    ValueError naming the domain and the class if there is no such class, or none of its images.
    """
    for name in classes:
        if name not in images.classes:
            raise ValueError(f"domain {domain!r} has no class {name!r}, it has {', '.join(images.classes)}")
    places = {images.classes.index(name): place for place, name in enumerate(classes)}
    chosen = [(index, places[label]) for index in range(len(images)) if (label := images.label(index)) in places]
    return _SomeClasses(
        dataset=images,
        indices=tuple(index for index, _ in chosen),
        labels=tuple(label for _, label in chosen),
        classes=tuple(classes),
    )
