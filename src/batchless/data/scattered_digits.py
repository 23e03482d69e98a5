"""The embedded sample of detection: real handwritten digits scattered over pieces of real photos.

Each image is a 96x96 crop of one of scikit-learn's two photos, darkened, with none to five handwritten digits of 18 to 34
pixels that do not touch; the tenth of the images that has none is there as in real data. The digits are 0 to 4: with ten
classes a small detector does not learn them in minutes. Boxes and masks are exact: the
mask is where the ink covers at least half, the box is the smallest around it.

Digit instances and photo halves are those of `handwriting.py`: split into training and test before anything is composed.
Image `i` is a pure function of (split, `i`). The writers are in both splits, as the bundled copy does not tell them apart.
"""

from functools import partial
from random import Random
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from batchless.data.handwriting import digit_instances, photo_halves
from batchless.data.objects import AnnotatedImage, DetectionImages, boxes_of, packed_masks

Split = Literal["train", "test"]

SIZE = 96
COUNTS = {"train": 800, "test": 200}
CLASSES = tuple("01234")
_WITHOUT_OBJECTS = 0.1
_MOST_OBJECTS = 5
_DIGIT_SIZE = (18, 34)  # pixels
_TURN = 0.1  # radians
_BRIGHTNESS, _CONTRAST = 0.5, 0.4  # of the background, relative to the photo
_LIGHTER = (110, 180)  # how much lighter than the background the ink is, in grey levels of 255
_TINT = 80  # how far the ink's colour is from grey
_INK = 1.5  # gain on the digit's intensity, cut at 1: strokes with flat tops and soft edges
_GAP = 2  # pixels between two digits' squares
_TRIES = 20  # at finding a free place


def scattered_digits(split: Split, *, count: int | None = None) -> DetectionImages:
    """The embedded images of a split, 96x96 RGB, five classes, with masks; `count` of them (default: 800 and 200).

    Raises:
        ValueError: a count below 1.

    >>> images = scattered_digits("test", count=3)
    >>> len(images), [len(image) for image in images.images], images.images[0].boxes.shape[1]
    (3, [1, 4, 3], 4)
    """
    count = COUNTS[split] if count is None else count
    if count < 1:
        raise ValueError(f"count={count}: give one image or more")
    digits, labels = digit_instances(split)
    digits, labels = digits[labels < len(CLASSES)], labels[labels < len(CLASSES)]
    photos = photo_halves(split)
    images = tuple(_composed(split, index, digits, labels, photos) for index in range(count))
    return DetectionImages(images=images, classes=CLASSES, found={})


def _composed(split: Split, index: int, digits: Tensor, labels: Tensor, photos: list[Tensor]) -> AnnotatedImage:
    rng = Random(f"scattered/{split}/{index}")
    canvas = _background(photos, rng)
    ground = canvas.mean()
    chosen: list[int] = []
    masks: list[Tensor] = []
    wanted = 0 if rng.random() < _WITHOUT_OBJECTS else rng.randint(1, _MOST_OBJECTS)
    squares: list[tuple[float, float, float]] = []
    for _ in range(wanted):
        place = _free_place(squares, rng)
        digit, turn = rng.randrange(len(digits)), rng.uniform(-_TURN, _TURN)
        tint = torch.tensor([rng.random() for _ in range(3)])
        lighter = rng.uniform(*_LIGHTER)
        if place is None:
            continue
        squares.append(place)
        ink = _ink(digits[digit], *place, turn)
        paint = ground + lighter + _TINT * (tint - tint.mean())
        canvas = torch.lerp(canvas, paint[:, None, None].expand_as(canvas), ink)
        chosen.append(digit)
        masks.append(ink >= 0.5)
    stacked = torch.stack(masks).to(torch.uint8) if masks else torch.zeros(0, SIZE, SIZE, dtype=torch.uint8)
    image = canvas.clamp(0, 255).round().to(torch.uint8)
    return AnnotatedImage(
        source=f"scattered digits {split} {index}",
        read=partial(_same, image),
        height=SIZE,
        width=SIZE,
        boxes=boxes_of(stacked) if masks else torch.zeros(0, 4),
        labels=labels[chosen],
        crowd=torch.zeros(len(chosen), dtype=torch.bool),
        areas=stacked.flatten(1).sum(1).float(),
        segmentations=packed_masks(stacked),
    )


def _same(image: Tensor) -> Tensor:
    return image


def _background(photos: list[Tensor], rng: Random) -> Tensor:
    """A dimmed crop: float32 `[3, SIZE, SIZE]`."""
    photo = photos[rng.randrange(len(photos))]
    top, left = (rng.randint(0, length - SIZE) for length in photo.shape[1:])
    crop = photo[:, top : top + SIZE, left : left + SIZE]
    mean = crop.mean()
    return _BRIGHTNESS * mean + _CONTRAST * (crop - mean)


def _free_place(taken: list[tuple[float, float, float]], rng: Random) -> tuple[float, float, float] | None:
    """Side, left and top of a square inside the image that keeps its distance from those taken; None if none was found."""
    for _ in range(_TRIES):
        side = rng.uniform(*_DIGIT_SIZE)
        left, top = (rng.uniform(0, SIZE - side) for _ in range(2))
        if all(
            left > x + other + _GAP or x > left + side + _GAP or top > y + other + _GAP or y > top + side + _GAP
            for other, x, y in taken
        ):
            return side, left, top
    return None


def _ink(digit: Tensor, side: float, left: float, top: float, turn: float) -> Tensor:
    """A digit `[8, 8]` stretched over a square, turned about its centre: `[SIZE, SIZE]`, 0 to 1."""
    angle = torch.tensor(turn)
    cos, sin, zoom = angle.cos(), angle.sin(), SIZE / side
    # In the units of affine_grid, where the image reaches from -1 to 1.
    x, y = ((2 * start + side) / SIZE - 1 for start in (left, top))
    matrix = torch.stack(
        [
            torch.stack([cos * zoom, sin * zoom, -(cos * x + sin * y) * zoom]),
            torch.stack([-sin * zoom, cos * zoom, (sin * x - cos * y) * zoom]),
        ]
    )
    grid = affine_grid(matrix[None], [1, 1, SIZE, SIZE], align_corners=False)
    drawn = grid_sample(digit[None, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (_INK * drawn[0, 0]).clamp(0, 1)
