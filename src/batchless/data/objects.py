"""Images whose objects are known: a box, a class and, where there is one, a mask for each."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Segmentation = Mapping[str, Any] | Sequence[Sequence[float]]
"""A mask as COCO writes it: polygons `[x, y, x, y, ...]`, or `{"size": [H, W], "counts": ...}`, counts compressed or not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotatedImage:
    """One image and its n objects.

    Attributes:
        source: names the image in errors: its path, or words.
        read: gives the image, uint8 `[3, H, W]`; ValueError naming it if it cannot be read.
        height: H, of the image as it is stored.
        width: W.
        boxes: float32 `[n, 4]`: left, top, right, bottom in pixels; right and bottom are where the object ends, so that width
            is right - left.
        labels: int64 `[n]`, indices into the data set's classes.
        crowd: bool `[n]`: groups (COCO) or difficult objects (VOC), which are not learned and neither hit nor missed.
        areas: float32 `[n]`, in square pixels: of the masks, where the data set gives them, else of the boxes.
        segmentations: of each object, as it was read; None: the data set has boxes only.
    """

    source: str
    read: Callable[[], Tensor]
    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor
    segmentations: tuple[Segmentation, ...] | None

    def __len__(self) -> int:
        """How many objects there are."""
        return len(self.labels)

    def image(self) -> Tensor:
        """The image, uint8 `[3, H, W]`.

        Raises:
            ValueError: it cannot be read, or it has another size than its annotation says, so that boxes would not fit.
        """
        image = self.read()
        if image.shape[1:] != (self.height, self.width):
            raise ValueError(
                f"{self.source}: the image is {image.shape[2]}x{image.shape[1]} pixels, its annotation says {self.width}x"
                f"{self.height}: the boxes would not fit; put the right file there"
            )
        return image

    def masks(self) -> Tensor:
        """The masks, uint8 `[n, H, W]` of 0 and 1, decoded now; ValueError naming the image if one is damaged."""
        if self.segmentations is None:
            raise ValueError(f"{self.source}: there are boxes only, no masks: choose a detector without masks")
        if not self.segmentations:
            return torch.zeros(0, self.height, self.width, dtype=torch.uint8)
        from faster_coco_eval.core import mask as coder

        decoded = coder.decode([self.run_lengths(index) for index in range(len(self))])
        return torch.from_numpy(decoded).permute(2, 0, 1).contiguous()

    def run_lengths(self, index: int) -> dict[str, Any]:
        """The mask of an object in COCO's compressed run lengths: `{"size": [H, W], "counts": bytes}`."""
        assert self.segmentations is not None
        try:
            return _run_lengths(self.segmentations[index], self.height, self.width)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.source}: the mask of object {index + 1} of {len(self)} is damaged ({error}); correct the annotation"
            ) from error

    def only(self, chosen: Tensor) -> "AnnotatedImage":
        """The same image with the objects that `chosen`, bool `[n]`, marks."""
        kept = chosen.nonzero().flatten().tolist()
        segmentations = None if self.segmentations is None else tuple(self.segmentations[index] for index in kept)
        return replace(
            self,
            boxes=self.boxes[chosen],
            labels=self.labels[chosen],
            crowd=self.crowd[chosen],
            areas=self.areas[chosen],
            segmentations=segmentations,
        )

    def without_image(self) -> "AnnotatedImage":
        """The same, but the image cannot be read any more: small enough to be sent to another process."""
        return replace(self, read=_sent_without_image)


def _sent_without_image() -> Tensor:
    raise AssertionError("this annotation was sent without its image")


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionImages:
    """A data set of annotated images.

    Attributes:
        images: in order.
        classes: their names, in the order of the labels.
        found: how often something in the annotations called for a decision, such as `boxes without area, left out`.
    """

    images: tuple[AnnotatedImage, ...]
    classes: tuple[str, ...]
    found: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_masks(self) -> bool:
        """Whether every image has masks."""
        return all(image.segmentations is not None for image in self.images)

    def require_objects(self, what: str) -> None:
        """Raise ValueError if no image has an object that counts: there would be nothing to learn or to find."""
        if not any(bool((~image.crowd).any()) for image in self.images):
            raise ValueError(
                f"none of the {len(self)} {what} images has an object: nothing to learn or to find in them"
            )

    def notes(self) -> list[str]:
        """What was found in the annotations, a line each."""
        return [f"{count} {what}" for what, count in sorted(self.found.items()) if count]


class ObjectCollector:
    """The objects of one image, as a reader meets them: what cannot be used is counted and left out."""

    def __init__(self, *, height: int, width: int, classes: Sequence[str], found: Counter[str]) -> None:
        self._height, self._width, self._found = height, width, found
        self._label = {name: index for index, name in enumerate(classes)}
        self._boxes: list[tuple[float, float, float, float]] = []
        self._labels: list[int] = []
        self._crowd: list[bool] = []
        self._areas: list[float] = []
        self._segmentations: list[Segmentation] = []

    def add(
        self,
        name: str | None,
        box: tuple[float, float, float, float],
        *,
        crowd: bool,
        area: float | None = None,
        segmentation: Segmentation | None = None,
    ) -> None:
        """Take an object: its class (None or unknown: left out), its box, cut at the image's border, and the rest."""
        if name not in self._label:
            self._found["objects of an unknown category, left out"] += 1
            return
        if not all(map(math.isfinite, box)):
            self._found["boxes that are not finite, left out"] += 1
            return
        left, right = (min(max(value, 0.0), self._width) for value in (box[0], box[2]))
        top, bottom = (min(max(value, 0.0), self._height) for value in (box[1], box[3]))
        if right <= left or bottom <= top:
            self._found["boxes without area, left out"] += 1
            return
        if (left, top, right, bottom) != box:
            self._found["boxes cut at the image's border"] += 1
        if crowd:
            self._found["crowds or difficult objects, not learned"] += 1
        self._boxes.append((left, top, right, bottom))
        self._labels.append(self._label[name])
        self._crowd.append(crowd)
        self._areas.append((right - left) * (bottom - top) if area is None else area)
        if segmentation is not None:
            self._segmentations.append(segmentation)

    def image(self, source: str, read: Callable[[], Tensor], *, masks: bool) -> AnnotatedImage:
        """The image with the objects taken."""
        if not self._boxes:
            self._found["images without objects, kept"] += 1
        return AnnotatedImage(
            source=source,
            read=read,
            height=self._height,
            width=self._width,
            boxes=torch.tensor(self._boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(self._labels, dtype=torch.int64),
            crowd=torch.tensor(self._crowd, dtype=torch.bool),
            areas=torch.tensor(self._areas, dtype=torch.float32),
            segmentations=tuple(self._segmentations) if masks else None,
        )


def _run_lengths(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Compressed run lengths of a mask of that size; everything is checked first, as the library's C code checks nothing."""
    from faster_coco_eval.core import mask as coder

    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its size is {list(segmentation['size'])}, the image's is {[height, width]}")
        runs = _runs(counts) if isinstance(counts, str | bytes) else list(counts)
        if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != height * width:
            raise ValueError(f"its runs do not add up to {height * width} pixels")
        packed: dict[str, Any] = coder.frPyObjects([{"size": [height, width], "counts": runs}], height, width)[0]
        return packed
    # Some data sets have polygons of two points beside others: lines, which cover nothing.
    polygons = [[float(value) for value in polygon] for polygon in segmentation if len(polygon) >= 6]
    limit = 2 * max(height, width)
    for polygon in polygons:
        if len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers, which are no pairs")
        if not all(abs(value) <= limit for value in polygon):
            raise ValueError("a polygon far outside of the image")
    if not polygons:
        raise ValueError("no polygon of three points or more")
    merged: dict[str, Any] = coder.merge(coder.frPyObjects(polygons, height, width))
    return merged


def _runs(compressed: str | bytes) -> list[int]:
    """Run lengths out of COCO's compressed text: 5 bits a character, low ones first; from the third on, differences.

    >>> _runs("52203")
    [5, 2, 2, 2, 5]
    """
    text = compressed.encode() if isinstance(compressed, str) else compressed
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError("characters that are no run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # negative
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("its run lengths end in the middle")
    return runs


def packed_masks(masks: Tensor) -> tuple[dict[str, Any], ...]:
    """Masks uint8 `[n, H, W]` of 0 and 1 in COCO's compressed run lengths."""
    if not len(masks):
        return ()
    import numpy as np
    from faster_coco_eval.core import mask as coder

    return tuple(coder.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy())))


def boxes_of(masks: Tensor) -> Tensor:
    """The smallest box around each mask: uint8 `[n, H, W]`, each with a pixel of 1, to float32 `[n, 4]`.

    >>> mask = torch.zeros(1, 4, 5, dtype=torch.uint8)
    >>> mask[0, 1:3, 2] = 1
    >>> boxes_of(mask).tolist()
    [[2.0, 1.0, 3.0, 3.0]]
    """
    from torchvision.ops import masks_to_boxes

    boxes: Tensor = masks_to_boxes(masks)
    # torchvision gives the last pixel, a box here ends behind it.
    return boxes + boxes.new_tensor([0, 0, 1, 1])
