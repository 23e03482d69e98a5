"""The embedded default: real handwritten digits on pieces of real photos, made from what scikit-learn ships.

The digits are scikit-learn's bundled copy of the UCI "Optical Recognition of Handwritten Digits" test set: 1797 images of
8x8 pixels by 13 writers. Each is upscaled with bicubic interpolation to 18-24 pixels, turned by up to 6 degrees, placed at
random and blended into a 32x32 crop of one of scikit-learn's two bundled photos (a temple, a flower) with its brightness
and contrast lowered. Half of the digits are painted in a random colour, half lighten the photo, whose texture then shows
through. The result resembles MNIST-M or house numbers at night: ten classes, 5748 training images (4 of each of 1437
digits) and 1080 test images (3 of each of 360).

What the splits do not share: the digits (split per class before anything is composed) and the photos (training uses the
left half of each, test the right half). What they do share: the writers, whom the bundled copy does not tell apart.

How hard it is: after one pass over 3000 images a linear classifier gets a third of the test images right, a ResNet-8 of
16, 32 and 64 channels between a fifth (`gn`) and nine tenths (`bn+ws`), 16 images per step, one seed each.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from batchless.data.memory import TensorImages

Split = Literal["train", "test"]

SIZE = 32
COPIES = {"train": 4, "test": 3}
TEST_SHARE = 0.2

# Tuned so that a small network learns it in one pass over 3000 images, and a linear classifier does not.
_DIGIT_SIZE = (18, 24)  # pixels
_TURN = (-0.1, 0.1)  # radians
_BRIGHTNESS, _CONTRAST = 0.5, 0.4  # of the background, relative to the photo
_LIGHTER = (120, 180)  # how much lighter than the background the ink is, in grey levels of 255
_TINT = 80  # how far a painted digit's colour is from grey, in grey levels of 255
_OPACITY = (0.9, 1.0)
_INK = 1.5  # gain on the digit's intensity, cut at 1: strokes with flat tops and soft edges

_SEEDS = {"instances": 7, "train": 1, "test": 2}
# One uniform number per image and use. New uses go to the end of the 16, so that the images made so far stay the same.
_DRAWS = 16
_USES = (
    "photo",
    "zoom",
    "top",
    "left",
    "size",
    "x",
    "y",
    "turn",
    "paint",
    "red",
    "green",
    "blue",
    "lighter",
    "opacity",
)


def handwriting(split: Split, *, copies: int | None = None) -> TensorImages:
    """The embedded images of a split, 32x32 RGB; image `i` is a pure function of `(split, i)`, whatever `copies` is.

    `copies` is how often each digit is composed (default: 4 for training, 3 for test). Image `i` shows digit
    `i % number of digits`; each copy has another place, size, colour and background. ValueError if `copies < 1`.

    >>> images = handwriting("test", copies=1)
    >>> len(images), images.image(17).shape, images.label(17), images.source(17)
    (360, torch.Size([3, 32, 32]), 0, 'handwriting test 17')
    """
    copies = COPIES[split] if copies is None else copies
    if copies < 1:
        raise ValueError(f"copies={copies}: each handwritten digit is composed at least once; give 1 or more")
    digits, labels = digit_instances(split)
    order = torch.arange(copies * len(digits)) % len(digits)
    draws = _draws(split, len(order))
    background = dimmed(crops(photo_halves(split), draws))
    return TensorImages(
        images=blend(background, _ink(digits[order], draws), draws),
        labels=tuple(labels[order].tolist()),
        classes=tuple("0123456789"),
        origins=((f"handwriting {split}", len(order)),),
    )


def digit_instances(split: Split) -> tuple[Tensor, Tensor]:
    """The handwritten digits of a split: intensities float32 `[n, 8, 8]` from 0 to 1, and labels int64 `[n]`.

    Four fifths of each class are for training, one fifth for test; whatever is made from digits starts here, so that no
    digit is ever in both.

    >>> digits, labels = digit_instances("test")
    >>> digits.shape, labels.bincount().tolist()
    (torch.Size([360, 8, 8]), [36, 37, 35, 37, 36, 36, 36, 36, 35, 36])
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, test = train_test_split(
        np.arange(len(bunch.target)), test_size=TEST_SHARE, stratify=bunch.target, random_state=_SEEDS["instances"]
    )
    chosen = train if split == "train" else test
    return torch.from_numpy(bunch.images[chosen]).float() / 16, torch.from_numpy(bunch.target[chosen]).long()


def photo_halves(split: Split) -> list[Tensor]:
    """The split's half of each photo, in full size and then in half size: float32 `[3, H, W]`, 0 to 255."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1).float() for photo in load_sample_images().images]
    halves = [photo.chunk(2, dim=2)[0 if split == "train" else 1] for photo in photos]
    return halves + [avg_pool2d(half, 2) for half in halves]


def _draws(split: Split, count: int) -> dict[str, Tensor]:
    """For each use a float32 `[count]` in [0, 1]; row i of the table is the same for every `count`."""
    table = np.random.default_rng(_SEEDS[split]).random((count, _DRAWS))
    return dict(zip(_USES, torch.from_numpy(table).float().unbind(dim=1), strict=False))


def _between(low: float, high: float, draw: Tensor) -> Tensor:
    return low + (high - low) * draw


def _index(draw: Tensor, count: int) -> Tensor:
    """A draw turned into an index below `count` (rounding to float32 can make a draw 1)."""
    return (draw * count).long().clamp(max=count - 1)


def crops(photos: list[Tensor], draws: dict[str, Tensor]) -> Tensor:
    """A random square of a random photo for each image: `[N, 3, SIZE, SIZE]`."""
    which = _index(draws["photo"], 2) + 2 * _index(draws["zoom"], 2)
    squares = torch.empty(len(which), 3, SIZE, SIZE)
    span = torch.arange(SIZE)
    for number, photo in enumerate(photos):
        chosen = (which == number).nonzero().flatten()
        top = _index(draws["top"][chosen], photo.shape[1] - SIZE + 1)
        left = _index(draws["left"][chosen], photo.shape[2] - SIZE + 1)
        rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
        squares[chosen] = photo[:, rows, columns].transpose(0, 1)
    return squares


def dimmed(photos: Tensor) -> Tensor:
    """The photos with brightness and contrast lowered, so that something lighter can be read on them."""
    mean = photos.mean(dim=(1, 2, 3), keepdim=True)
    return _BRIGHTNESS * mean + _CONTRAST * (photos - mean)


def _ink(digits: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """The digits `[N, 8, 8]` upscaled, turned and placed anywhere inside the image: `[N, 1, SIZE, SIZE]`, 0 to 1."""
    size, turn = _between(*_DIGIT_SIZE, draws["size"]), _between(*_TURN, draws["turn"])
    zoom, cos, sin = SIZE / size, turn.cos(), turn.sin()
    # In the units of affine_grid, where the image reaches from -1 to 1: centre and half width add up to at most 1.
    x, y = (_between(-1, 1, draws[axis]) * (1 - 1 / zoom) for axis in ("x", "y"))
    rows = [
        torch.stack([cos * zoom, sin * zoom, -(cos * x + sin * y) * zoom], dim=1),
        torch.stack([-sin * zoom, cos * zoom, (sin * x - cos * y) * zoom], dim=1),
    ]
    grid = affine_grid(torch.stack(rows, dim=1), [len(digits), 1, SIZE, SIZE], align_corners=False)
    drawn = grid_sample(digits[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (_INK * drawn).clamp(0, 1)


def blend(background: Tensor, ink: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Painted or lightened backgrounds, by the ink's intensity: uint8 `[N, 3, SIZE, SIZE]`."""
    columns = {use: draw[:, None, None, None] for use, draw in draws.items()}
    lighter = _between(*_LIGHTER, columns["lighter"])
    colour = torch.cat([columns[channel] for channel in ("red", "green", "blue")], dim=1)
    paint = background.mean(dim=(1, 2, 3), keepdim=True) + _TINT * (colour - colour.mean(dim=1, keepdim=True))
    ground = torch.where(columns["paint"] < 0.5, paint, background)
    strength = ink * _between(*_OPACITY, columns["opacity"])
    return torch.lerp(background, ground + lighter, strength).clamp(0, 255).round().to(torch.uint8)
