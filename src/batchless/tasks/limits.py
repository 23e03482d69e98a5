"""A part of a data set, where the settings want one."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from batchless.data import epoch_order
from batchless.data.label_maps import LabelMaps
from batchless.data.objects import DetectionImages

Dataset = TypeVar("Dataset")
Annotated = TypeVar("Annotated", DetectionImages, LabelMaps)


def limited(dataset: Dataset, count: int | None, first: Callable[..., Dataset], *, seed: int, name: str) -> Dataset:
    """The first `count` samples of a seeded order in which every beginning has the classes in proportion; None: all.

    Args:
        dataset: labelled images or clips.
        count: how many.
        first: `first_images` or `first_clips`.
        seed: of the order.
        name: of the setting in `data`, for errors.

    Raises:
        ValueError: a count that the data set cannot give.
    """
    if count is None:
        return dataset
    try:
        return first(dataset, count, seed=seed)
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from error


def some_images(images: Annotated, count: int | None, *, seed: int, name: str) -> Annotated:
    """The first `count` annotated images of a seeded order, in their own order; all with None.

    Args:
        images: to choose from.
        count: how many.
        seed: of the order.
        name: of the split, for errors.

    Raises:
        ValueError: there are fewer.
    """
    if count is None:
        return images
    if count > len(images):
        raise ValueError(f"data.{name}_images={count}: the data set has {len(images)} {name} images")
    chosen = sorted(epoch_order(len(images), seed=seed, epoch=0)[:count])
    return replace(images, images=tuple(images.images[index] for index in chosen))
