"""From a decoded image to the square that the network sees: at random for training, centred for evaluation."""

import math
from dataclasses import dataclass
from random import Random

from torch import Tensor
from torchvision.transforms.v2 import functional


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens at random to a training image.

    Attributes:
        crop_padding: black pixels added on each side before a random square is cut out, for small images. With 0 a random
            square is still cut out of an image that is not square.
        random_resized_crop: cut out a random part of the image and resize it (ImageNet's way) instead of padding and cropping.
        scale: smallest and largest share of the image's area in that part, within (0, 1].
        ratio: smallest and largest width / height of that part.
        flip: mirror every second image, by chance; not for digits or letters.

    """

    crop_padding: int = 4
    random_resized_crop: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding={self.crop_padding}: give 0 or more pixels")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale}: give two shares of the area, 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio={self.ratio}: give two ratios width / height, 0 < smallest <= largest")


def centred(image: Tensor, size: int) -> Tensor:
    """The image with its shorter side resized to `size`, then its central square: `[3, size, size]`."""
    if image.shape[-2:] == (size, size):
        return image
    square: Tensor = functional.center_crop(_shorter_side(image, size), [size, size])
    return square


def augmented(image: Tensor, size: int, *, augment: Augment, rng: Random) -> Tensor:
    """A random view of the image by `augment`: `[3, size, size]`, a function of the image and the state of `rng`."""
    # Drawn first, so that the same images are mirrored whatever the other settings are.
    mirrored = augment.flip and rng.random() < 0.5
    if augment.random_resized_crop:
        top, left, height, width = _random_part(image.shape[-2], image.shape[-1], augment=augment, rng=rng)
        image = functional.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    else:
        image = _shorter_side(image, size)
        if augment.crop_padding:
            image = functional.pad(image, [augment.crop_padding] * 4)
        height, width = image.shape[-2:]
        if (height, width) != (size, size):
            image = functional.crop(image, _upto(height - size, rng), _upto(width - size, rng), size, size)
    return functional.horizontal_flip(image) if mirrored else image


def _shorter_side(image: Tensor, size: int) -> Tensor:
    return image if min(image.shape[-2:]) == size else functional.resize(image, [size], antialias=True)


def _upto(largest: int, rng: Random) -> int:
    """A random integer from 0 to `largest`, both included."""
    return int(rng.random() * (largest + 1))


def _random_part(height: int, width: int, *, augment: Augment, rng: Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part, as torchvision's RandomResizedCrop draws it."""
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        part_height, part_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < part_height <= height and 0 < part_width <= width:
            return _upto(height - part_height, rng), _upto(width - part_width, rng), part_height, part_width
    # A long and narrow image: the largest central part with a permitted ratio.
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    part_height, part_width = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width
