"""The embedded clips: real handwritten digits that move on real photos, whose class is the motion and nothing else.

Each clip has 16 frames of 32x32 pixels: one of scikit-learn's handwritten digits on a piece of one of its photos (see
`handwriting.py` for both, and for how they are blended). The digit moves to the left, right, up or down, or turns on the
spot. What leaves the image on one side comes back on the other, the place of the first frame is uniform, and so is the
angle. So in every class the digit of any one frame lies anywhere, at any angle, with equal chances: **a single frame says
nothing about the class**. Played backwards, a clip of one class is a clip of the opposite class.

What the splits do not share: the digits (split per class before anything is made of them) and the photos (training uses the
left half of each, test the right half). 2874 training clips (each of 1437 digits twice), 720 test clips (each of 360 twice).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from batchless.data.handwriting import SIZE, Split, blend, crops, digit_instances, dimmed, photo_halves
from batchless.data.video_files import Choose, ClipFrames

LENGTH = 16
MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise")
COPIES = 2

_DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0))  # x to the right, y downwards
_TURNS = (0, 0, 0, 0, 1, -1)
_SPEED = (0.8, 1.6)  # pixels per frame
_TURN = (0.1, 0.2)  # radians per frame
_DIGIT_SIZE = (16, 21)  # pixels; the diagonal is below SIZE, so that a digit does not meet itself
_INK = 1.5  # gain on the digit's intensity, cut at 1: strokes with flat tops and soft edges
_SEEDS = {"train": 11, "test": 12}
# One uniform number per clip and use. New uses go to the end, so that the clips made so far stay the same.
_USES = tuple("photo zoom top left size x y angle speed paint red green blue lighter opacity".split())


@dataclass(frozen=True, kw_only=True, eq=False)
class MovingDigits:
    """The clips of a split; clip `i` is a function of (split, `i`) alone, shows digit `i % n` of n, and is of class `i % 6`."""

    split: Split
    digits: Tensor
    photos: tuple[Tensor, ...]
    copies: int
    classes: tuple[str, ...] = MOTIONS

    def __len__(self) -> int:
        return self.copies * len(self.digits)

    def clip(self, index: int, choose: Choose) -> ClipFrames:
        """The frames that `choose` wants, `[T, 3, 32, 32]`."""
        positions = choose(LENGTH)
        draws = dict(zip(_USES, np.random.default_rng([_SEEDS[self.split], index]).random(len(_USES)), strict=True))
        images = self._drawn(index, draws, torch.tensor(positions, dtype=torch.float32))
        return ClipFrames(images=images, length=LENGTH)

    def _drawn(self, index: int, draws: dict[str, float], times: Tensor) -> Tensor:
        x, y, angle = motion(self.label(index), draws, times)
        size = _between(_DIGIT_SIZE, draws["size"])
        single = {use: torch.tensor([draw], dtype=torch.float32) for use, draw in draws.items()}
        digit = self.digits[index % len(self.digits)]
        return blend(dimmed(crops(list(self.photos), single)), _ink(digit, x, y, angle, size), single)

    def label(self, index: int) -> int:
        """The index of the clip's motion in `classes`."""
        return index % len(MOTIONS)

    def source(self, index: int) -> str:
        """The split and the number."""
        return f"moving digits {self.split} {index}"


def moving_digits(split: Split, *, copies: int = COPIES) -> MovingDigits:
    """The embedded clips of a split; `copies` is how often each digit is shown, each time moving in another way.

    ValueError if `copies < 1`.

    >>> clips = moving_digits("test")
    >>> clips.clip(0, lambda length: (0, length - 1)).images.shape
    torch.Size([2, 3, 32, 32])
    """
    if copies < 1:
        raise ValueError(f"copies={copies}: each handwritten digit is shown at least once; give 1 or more")
    return MovingDigits(split=split, digits=digit_instances(split)[0], photos=tuple(photo_halves(split)), copies=copies)


def motion(label: int, draws: dict[str, float], times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The digit's centre x, y in pixels and its angle clockwise in radians, at each of `times` in frames.

    Args:
        label: of the motion.
        draws: uniform numbers from 0 to 1: `x`, `y`, `angle` for the first frame, `speed`.
        times: `[T]`.
    """
    across, down = _DIRECTIONS[label]
    travelled = _between(_SPEED, draws["speed"]) * times
    turned = _TURNS[label] * _between(_TURN, draws["speed"]) * times
    x = (draws["x"] * SIZE + across * travelled) % SIZE
    y = (draws["y"] * SIZE + down * travelled) % SIZE
    return x, y, draws["angle"] * 2 * math.pi + turned


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def _ink(digit: Tensor, x: Tensor, y: Tensor, angle: Tensor, size: float) -> Tensor:
    """The digit `[8, 8]` at each place and angle, on a torus: `[T, 1, SIZE, SIZE]`, 0 to 1."""
    pixels = torch.arange(SIZE) + 0.5
    # How far each pixel is from the digit's centre, the shorter way round.
    right = ((pixels - x[:, None] + SIZE / 2) % SIZE - SIZE / 2)[:, None, :].expand(-1, SIZE, -1)
    below = ((pixels - y[:, None] + SIZE / 2) % SIZE - SIZE / 2)[:, :, None].expand(-1, -1, SIZE)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([cos * right + sin * below, cos * below - sin * right], dim=3) * 2 / size
    drawn = grid_sample(
        digit.expand(len(x), 1, -1, -1), grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return (_INK * drawn).clamp(0, 1)
