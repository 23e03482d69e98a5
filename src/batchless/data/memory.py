"""Datasets that fit in memory: one uint8 tensor and a label for each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorImages:
    """Images held in one uint8 tensor `[N, 3, H, W]`, or `[N, 1, H, W]` for grey images.

    Grey images are handed out with three equal channels. `origins` names where the images come from, in order, as pairs
    (name, number of images); it only serves error messages.
    """

    images: Tensor
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    origins: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        assert self.images.ndim == 4
        assert self.images.shape[1] in (1, 3)
        assert len(self.images) == len(self.labels) == sum(count for _, count in self.origins)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """The image as uint8 `[3, H, W]`; a view, not to be written to."""
        image = self.images[index]
        return image if image.shape[0] == 3 else image.expand(3, -1, -1)

    def images_of(self, indices: Sequence[int]) -> Tensor:
        """Copies of several images in one piece, uint8 `[len(indices), 3, H, W]`."""
        images = self.images.index_select(0, torch.tensor(indices, dtype=torch.int64))
        return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1).contiguous()

    def label(self, index: int) -> int:
        """The index of the image's class in `classes`."""
        return self.labels[index]

    def source(self, index: int) -> str:
        """Where the image comes from: the origin's name and the position in it."""
        for (name, count), end in zip(self.origins, accumulate(count for _, count in self.origins), strict=True):
            if index < end:
                return f"{name} {index - end + count}"
        raise IndexError(index)


def checked_labels(labels: list[int], classes: int, *, path: Path) -> tuple[int, ...]:
    """The labels of `path` as a tuple; ValueError naming file and index if one is outside `0 .. classes - 1`."""
    for index, label in enumerate(labels):
        if not 0 <= label < classes:
            raise ValueError(
                f"{path}: label {label} of image {index} is out of range, there are {classes} classes (0 to {classes - 1});"
                " replace the file by an undamaged copy"
            )
    return tuple(labels)
