"""The classes of well-known segmentation data sets, and colours to show classes in."""

from collections.abc import Sequence

import torch
from torch import Tensor

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()

CITYSCAPES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
"""The 19 classes that are trained: the id in `labelIds` files and the colour; `labelTrainIds` files count them from 0."""

CITYSCAPES_IDS = 34
"""The ids in `labelIds` files are 0 to 33; -1, the number plates, is stored as 255."""


def voc_colours(count: int) -> Tensor:
    """The first colours of Pascal VOC's devkit, uint8 `[count, 3]`: the bits of the number are dealt out to the channels.

    >>> voc_colours(3).tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    numbers = torch.arange(count)
    colours = torch.zeros(count, 3, dtype=torch.long)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.to(torch.uint8)


def label_colours(classes: Sequence[str]) -> Tensor:
    """A colour for each class, uint8 `[K, 3]`: Cityscapes' own, else VOC's, black for a class named background only."""
    if tuple(classes) == tuple(CITYSCAPES):
        return torch.tensor([colour for _, colour in CITYSCAPES.values()], dtype=torch.uint8)
    first = 0 if classes and classes[0] == "background" else 1
    return voc_colours(len(classes) + first)[first:]
