"""The embedded sample of segmentation: the scattered digits, with the class of every pixel.

The images are those of `scattered_digits.py`; a pixel is background, or of the digit whose ink covers at least half of it.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from batchless.data.label_maps import IGNORED, LabelMaps, MappedImage, label_table
from batchless.data.objects import AnnotatedImage
from batchless.data.scattered_digits import CLASSES, scattered_digits

MAP_CLASSES = ("background", *CLASSES)


def scattered_maps(split: Literal["train", "test"], *, count: int | None = None) -> LabelMaps:
    """The embedded images of a split, 96x96 RGB, with label maps of six classes; `count` of them (default: 800 and 200).

    Raises:
        ValueError: a count below 1.

    >>> images = scattered_maps("test", count=2)
    >>> images.classes[:3], images.sample(1)[1].unique().tolist()
    (('background', '0', '1'), [0, 1, 3, 4])
    """
    images = tuple(
        MappedImage(
            source=image.source,
            read=image.read,
            map_source=f"the map of {image.source}",
            read_map=partial(_label_map, image.without_image()),
        )
        for image in scattered_digits(split, count=count).images
    )
    table = label_table({label: label for label in range(len(MAP_CLASSES))}, [IGNORED])
    return LabelMaps(images=images, classes=MAP_CLASSES, table=table, found={})


def _label_map(image: AnnotatedImage) -> Tensor:
    # The digits do not touch: the largest of zeros and one label is that label.
    numbered = image.masks() * (image.labels + 1).to(torch.uint8)[:, None, None]
    return torch.cat([torch.zeros(1, image.height, image.width, dtype=torch.uint8), numbered]).amax(0)
