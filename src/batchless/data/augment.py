"""From a decoded image to the square that the network sees: at random for training, centred for evaluation."""

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from batchless.data.seeding import seed_torch

# Random erasing as its paper has it on ImageNet (Zhong et al., arXiv 1708.04896); the colour is that of timm and torchvision.
_ERASED_SCALE, _ERASED_RATIO = (0.02, 0.33), (0.3, 1 / 0.3)
_MAGNITUDES = 31


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens at random to a training image, in this order; then it is normalized.

    Attributes:
        crop_padding: black pixels added on each side before a random square is cut out, for small images. With 0 a random
            square is still cut out of an image that is not square.
        random_resized_crop: cut out a random part of the image and resize it (ImageNet's way) instead of padding and cropping.
        scale: smallest and largest share of the image's area in that part, within (0, 1].
        ratio: smallest and largest width / height of that part.
        flip: mirror every second image, by chance; not for digits or letters.
        rotation: turn by an angle of up to so many degrees either way, nearest pixels, black corners (torchvision's
            RandomRotation); 0: none.
        rand_augment: so many operations of RandAugment (arXiv 1909.13719), which moves, turns and recolours; 0: none.
        rand_augment_magnitude: how strong they are, from 0 to 30; the paper has 9 for ResNet-50, with 2 operations.
        color_jitter: brightness, contrast and saturation are multiplied, in random order, by factors from `1 - color_jitter`
            to `1 + color_jitter`; 0: none.
        erasing: share of the images of which a random rectangle is filled with the mean colour, after normalization.

    """

    crop_padding: int = 4
    random_resized_crop: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    rotation: float = 0.0
    rand_augment: int = 0
    rand_augment_magnitude: int = 9
    color_jitter: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding={self.crop_padding}: give 0 or more pixels")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale}: give two shares of the area, 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio={self.ratio}: give two ratios width / height, 0 < smallest <= largest")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation={self.rotation}: give degrees from 0 to 180")
        if self.rand_augment < 0:
            raise ValueError(f"rand_augment={self.rand_augment}: give a number of operations, or 0 for none")
        if not 0 <= self.rand_augment_magnitude < _MAGNITUDES:
            raise ValueError(f"rand_augment_magnitude={self.rand_augment_magnitude}: give 0 to {_MAGNITUDES - 1}")
        for name in ("color_jitter", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to 1")


def centred(image: Tensor, size: int, *, resize_to: int | None = None) -> Tensor:
    """The image with its shorter side resized to `resize_to` (None: `size`), then its central square: `[3, size, size]`."""
    if resize_to is None and image.shape[-2:] == (size, size):
        return image
    square: Tensor = functional.center_crop(_shorter_side(image, resize_to or size), [size, size])
    return square


def augmented(image: Tensor, size: int, *, augment: Augment, rng: Random) -> Tensor:
    """A random view of the image by `augment`, all but the erasing: `[3, size, size]`, a function of the image and of `rng`."""
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
    if mirrored:
        image = functional.horizontal_flip(image)
    if augment.rotation:
        image = functional.rotate(image, rng.uniform(-augment.rotation, augment.rotation))
    if augment.rand_augment:
        image = _rand_augmented(image, augment.rand_augment, augment.rand_augment_magnitude, rng=rng)
    return _jittered(image, augment.color_jitter, rng=rng) if augment.color_jitter else image


def erased_part(size: int, *, augment: Augment, rng: Random) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of the part of a square that `augment` erases; None: it erases nothing."""
    return _part(size, size, _ERASED_SCALE, _ERASED_RATIO, rng=rng) if rng.random() < augment.erasing else None


def _shorter_side(image: Tensor, size: int) -> Tensor:
    return image if min(image.shape[-2:]) == size else functional.resize(image, [size], antialias=True)


def _upto(largest: int, rng: Random) -> int:
    """A random integer from 0 to `largest`, both included."""
    return int(rng.random() * (largest + 1))


def _random_part(height: int, width: int, *, augment: Augment, rng: Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part, as torchvision's RandomResizedCrop draws it."""
    if part := _part(height, width, augment.scale, augment.ratio, rng=rng):
        return part
    # A long and narrow image: the largest central part with a permitted ratio.
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    part_height, part_width = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def _part(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], *, rng: Random
) -> tuple[int, int, int, int] | None:
    """A part with its share of the area in `scale` and its width / height in `ratio`; None if ten draws do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        drawn = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        part_height, part_width = round(math.sqrt(area / drawn)), round(math.sqrt(area * drawn))
        if 0 < part_height <= height and 0 < part_width <= width:
            return _upto(height - part_height, rng), _upto(width - part_width, rng), part_height, part_width
    return None


def _rand_augmented(image: Tensor, operations: int, magnitude: int, *, rng: Random) -> Tensor:
    # torchvision draws from torch's global generator. The accelerators' state is not kept here, so it is not seeded either.
    with torch.random.fork_rng(devices=[]):
        seed_torch(rng.getrandbits(63), "cpu")
        result: Tensor = v2.RandAugment(operations, magnitude, _MAGNITUDES)(image)
    return result


def _jittered(image: Tensor, strength: float, *, rng: Random) -> Tensor:
    adjustments = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    rng.shuffle(adjustments)
    for adjust in adjustments:
        image = adjust(image, rng.uniform(1 - strength, 1 + strength))
    return image
