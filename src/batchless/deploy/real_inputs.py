"""Real images and clips, as each task's evaluation sees them, by which an exported network is checked."""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from batchless.data import ImageDataset, open_images
from batchless.data.clip_loading import evaluated_frames
from batchless.data.clips import open_clips
from batchless.data.label_maps import LabelMaps
from batchless.data.map_loading import resized_image
from batchless.data.object_loading import resized_size
from batchless.data.open_label_maps import open_label_maps
from batchless.data.open_objects import open_objects
from batchless.deploy.images import as_evaluated
from batchless.tasks import Trained
from batchless.tasks.segment.setup import opened_maps

BATCHES = (1, 3)
"""How many at a time: one, as a graph may hold the number it was made with, and several."""

Inputs = tuple[list[Tensor], str]
"""Batches of uint8, not yet normalized, and where they are from."""


def real_squares(trained: Trained) -> Inputs:
    """Squares `[N, 3, S, S]`."""
    return _of_the_run(trained, partial(_squares, trained), "the embedded handwriting")


def real_clips(trained: Trained) -> Inputs:
    """Clips `[N, T, 3, S, S]`."""
    return _of_the_run(trained, partial(_clips, trained), "the embedded clips", what="clips")


def real_scenes(trained: Trained, *, multiple: int) -> Inputs:
    """Images `[N, 3, H, W]` of two sizes: one whole, and several cut to half the smallest.

    Args:
        trained: a segmenter.
        multiple: of which height and width are to be; black is added below and to the right.
    """
    return _of_the_run(trained, partial(_scenes, trained, multiple), "the embedded sample")


def real_pictures(trained: Trained) -> Inputs:
    """Images `[3, H, W]` one by one, resized as the detector does."""
    return _of_the_run(trained, partial(_pictures, trained), "the embedded sample")


def _of_the_run(
    trained: Trained, take: Callable[[str | None], list[Tensor]], embedded: str, *, what: str = "images"
) -> Inputs:
    """The run's test images; where they are not on this machine, or cannot be read, the embedded ones."""
    root = trained.config.data.root
    try:
        return take(root), f"the run's test {what}"
    except ValueError:
        if root is None:
            raise
        return take(None), embedded


def _spread(available: int) -> list[int]:
    """Indices evenly spread over a data set; some come twice if it has fewer."""
    count = sum(BATCHES)
    return [number * available // count for number in range(count)]


def _batched(samples: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.split(torch.stack(list(samples)), list(BATCHES)))


def _squares(trained: Trained, root: str | None) -> list[Tensor]:
    images: ImageDataset = open_images(root, "test")
    return _batched([as_evaluated(images.image(index), trained) for index in _spread(len(images))])


def _clips(trained: Trained, root: str | None) -> list[Tensor]:
    clips, data = open_clips(root, "test"), trained.config.data
    return _batched(
        [
            evaluated_frames(clips, index, trained.config.video, data.image_size, resize_to=data.resize_shorter_side)[
                0
            ][0]
            for index in _spread(len(clips))
        ]
    )


def _scenes(trained: Trained, multiple: int, root: str | None) -> list[Tensor]:
    maps: LabelMaps = open_label_maps(None, "test") if root is None else opened_maps(trained.config, root, "test")
    augment = trained.config.segment.augment(flip=False)
    images = [maps.images[index].read() for index in _spread(len(maps))]
    first, *others = [resized_image(image, *augment.size(*image.shape[1:])) for image in images]
    # Of another size than the first one, even where all images of the data set have one.
    height, width = (max(min(image.shape[side] for image in others) // 2, 1) for side in (1, 2))
    cut = torch.stack([image[:, :height, :width] for image in others])
    return [_padded(first[None], multiple), _padded(cut, multiple)]


def _padded(images: Tensor, multiple: int) -> Tensor:
    height, width = (multiple * ceil(side / multiple) for side in images.shape[-2:])
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def _pictures(trained: Trained, root: str | None) -> list[Tensor]:
    images, settings = open_objects(root, "test").images, trained.config.detector
    found = []
    for index in _spread(len(images)):
        image = images[index].image()
        size = resized_size(*image.shape[1:], shorter_side=settings.shorter_side, longest_side=settings.longest_side)
        found.append(functional.resize(image, list(size), antialias=True))
    return found
