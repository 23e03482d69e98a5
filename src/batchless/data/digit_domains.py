"""The embedded default of federated learning: one task, ten digits, in five domains that look unlike each other.

| domain | made like | what it shows |
|---|---|---|
| `plain` | MNIST | white handwriting on black |
| `photos` | MNIST-M | handwriting that inverts the crop of a photo it stands on |
| `street` | SVHN | coloured handwriting on a coloured wall, blurred, with parts of neighbouring digits |
| `scanner` | USPS | dark handwriting on light paper, 16x16 pixels enlarged, with noise |
| `fonts` | SynthDigits | coloured print in three weights of one font, turned, slanted and blurred |

They are made like those data sets, they are not those data sets: figures on them compare methods with each other, not with
published tables. The handwriting is scikit-learn's 1797 real digits (see `handwriting.py`), the photos are scikit-learn's
two, the font is the one that PIL brings.

What is shared, and what is not: digits and photo halves are split into training and test before anything is made of them.
The training digits are then dealt out to the four handwritten domains, so no two of them train on the same digit; each
tests on all test digits. The font has no instances: training and test differ in place, size, weight and colour only, as in
SynthDigits. The writers are in both splits, as the bundled copy does not tell them apart.

How unlike they are: a network of three convolutions with BatchNorm, one client of 743 images per domain, 30 rounds of one
epoch (batches of 32, learning rate 0.05), one seed, has a mean test accuracy of 89.5 when every client trains alone, 85.7
when everything is averaged, and 93.2 when the normalization layers stay with the clients.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from batchless.data.digit_drawing import blurred, column, placed, printed_digits, slope
from batchless.data.handwriting import crops, digit_instances, photo_halves
from batchless.data.memory import TensorImages

Split = Literal["train", "test"]

SIZE = 32
HANDWRITTEN = ("plain", "photos", "street", "scanner")
DIGIT_DOMAINS = (*HANDWRITTEN, "fonts")
COPIES = {"train": 4, "test": 2}
_PRINTED = {"train": 359, "test": 360}  # as many printed as handwritten digits before copies
_INK = 1.5  # gain on a written digit's intensity, cut at 1: strokes with flat tops and soft edges
_DRAWS = 24  # uniform numbers for each image; new uses go to the end, so that the images made so far stay the same


def digit_domains(split: Split, *, copies: int | None = None) -> dict[str, TensorImages]:
    """The five domains of a split, 32x32, in RGB or grey; image `i` is a function of (domain, split, `i`) alone.

    `copies` is how often each digit is drawn (default: 4 for training, 2 for test), each time at another place, in another
    size and colour; copy `c` of digit `d` of a domain's n is image `c * n + d`. ValueError if `copies < 1`.

    >>> domains = digit_domains("test", copies=1)
    >>> {name: len(images) for name, images in domains.items()}
    {'plain': 360, 'photos': 360, 'street': 360, 'scanner': 360, 'fonts': 360}
    >>> domains["street"].image(17).shape, domains["street"].label(17), domains["street"].source(17)
    (torch.Size([3, 32, 32]), 0, 'digits street test 17')
    """
    copies = COPIES[split] if copies is None else copies
    if copies < 1:
        raise ValueError(f"copies={copies}: each digit is drawn at least once; give 1 or more")
    digits, labels = digit_instances(split)
    result = {}
    for domain, draw in zip(HANDWRITTEN, (_plain, _photos, _street, _scanner), strict=True):
        own = domain_instances(domain, split)
        order = own[torch.arange(copies * len(own)) % len(own)]
        dice = _Dice(domain, split, len(order))
        images = draw(digits[order], digits[own], dice, split)
        result[domain] = _images(images, labels[order], f"digits {domain} {split}")
    printed = torch.arange(copies * _PRINTED[split]) % _PRINTED[split] % 10
    dice = _Dice("fonts", split, len(printed))
    result["fonts"] = _images(_fonts(printed, dice), printed, f"digits fonts {split}")
    return result


def domain_instances(domain: str, split: Split) -> Tensor:
    """Which of `digit_instances(split)` a handwritten domain shows: sorted positions, int64.

    Training digits of each class are dealt out to the four domains in turn; of the test digits each domain has all.
    """
    labels = digit_instances(split)[1]
    if split == "test":
        return torch.arange(len(labels))
    turn = HANDWRITTEN.index(domain)
    dealt = [(labels == label).nonzero().flatten()[turn :: len(HANDWRITTEN)] for label in range(10)]
    return torch.cat(dealt).sort().values


class _Dice:
    """The random numbers of a domain's images: the i-th of each kind is the same whatever the count."""

    def __init__(self, domain: str, split: Split, count: int) -> None:
        self.count = count
        self._entropy = f"digits/{domain}/{split}"
        table = np.random.default_rng(list(self._entropy.encode())).random((count, _DRAWS))
        self._columns = iter(torch.from_numpy(table).float().unbind(dim=1))

    def between(self, low: float, high: float) -> Tensor:
        """A uniform number for each image."""
        return low + (high - low) * next(self._columns)

    def below(self, limit: int) -> Tensor:
        """A uniform integer for each image (rounding to float32 can make a draw 1)."""
        return (limit * next(self._columns)).long().clamp(max=limit - 1)

    def colour(self) -> Tensor:
        """A colour for each image, 0 to 1: `[N, 3, 1, 1]`."""
        return torch.stack([next(self._columns) for _ in range(3)], dim=1)[:, :, None, None]

    def noise(self, size: int) -> Tensor:
        """Standard normal numbers: `[N, 1, size, size]`."""
        rng = np.random.default_rng(list(f"{self._entropy}/noise".encode()))
        return torch.from_numpy(rng.standard_normal((self.count, 1, size, size), dtype=np.float32))


def _images(images: Tensor, labels: Tensor, origin: str) -> TensorImages:
    """From values of 0 to 255 to a dataset."""
    return TensorImages(
        images=images.clamp(0, 255).round().to(torch.uint8),
        labels=tuple(labels.tolist()),
        classes=tuple("0123456789"),
        origins=((origin, len(labels)),),
    )


def _written(digits: Tensor, dice: _Dice, sizes: tuple[float, float], shift: float, *, size: int = SIZE) -> Tensor:
    """Ink `[N, 1, size, size]` from 0 to 1 of digits of `sizes` pixels, up to `shift` pixels off the centre."""
    side, turn = dice.between(*sizes), dice.between(-0.15, 0.15)
    x, y = dice.between(-shift, shift), dice.between(-shift, shift)
    return (_INK * placed(digits, size, height=side, width=side, x=x, y=y, turn=turn)).clamp(0, 1)


def _plain(digits: Tensor, others: Tensor, dice: _Dice, split: Split) -> Tensor:
    return 255 * _written(digits, dice, (19, 24), 2)


def _photos(digits: Tensor, others: Tensor, dice: _Dice, split: Split) -> Tensor:
    ink = _written(digits, dice, (20, 25), 2)
    which = {"photo": dice.between(0, 1), "zoom": dice.between(0, 1), "top": dice.between(0, 1)}
    ground = crops(photo_halves(split), {**which, "left": dice.between(0, 1)})
    return (ground - 255 * ink).abs()


def _street(digits: Tensor, others: Tensor, dice: _Dice, split: Split) -> Tensor:
    side, turn, slant = dice.between(20, 26), dice.between(-0.15, 0.15), dice.between(-0.2, 0.2)
    x, y = dice.between(-1.5, 1.5), dice.between(-1.5, 1.5)
    look = {"height": side, "width": 0.8 * side, "turn": turn, "slant": slant}
    ink = placed(digits, SIZE, x=x, y=y, **look)
    # A neighbour on either side, of which the image's border leaves some.
    for direction in (-1, 1):
        neighbour, gap = others[dice.below(len(others))], dice.between(0.6, 0.9)
        ink = torch.maximum(ink, placed(neighbour, SIZE, x=x + direction * gap * side, y=y, **look))
    wall = column(dice.between(60, 190)) + 70 * (dice.colour() - 0.5)
    lighter = torch.where(dice.between(0, 1) < 0.5, -1.0, 1.0) * dice.between(60, 130)
    paint = wall + column(lighter) + 70 * (dice.colour() - 0.5)
    light = slope(SIZE, direction=dice.between(0, 2 * np.pi), strength=dice.between(0, 25))
    painted = torch.lerp(wall.expand(-1, -1, SIZE, SIZE), paint, (_INK * ink).clamp(0, 1)) + light
    return blurred(painted, dice.between(0.3, 1.1)) + 4 * dice.noise(SIZE)


def _scanner(digits: Tensor, others: Tensor, dice: _Dice, split: Split) -> Tensor:
    half = SIZE // 2
    ink = _written(digits, dice, (13, 16), 0.5, size=half)
    paper, density = column(dice.between(200, 245)), column(dice.between(120, 190))
    light = slope(half, direction=dice.between(0, 2 * np.pi), strength=dice.between(0, 15))
    scanned = paper + light - density * ink + 10 * dice.noise(half)
    return scanned.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def _fonts(labels: Tensor, dice: _Dice) -> Tensor:
    glyphs = printed_digits()[dice.below(3), labels]
    height, stretch = dice.between(22, 34), dice.between(0.7, 1.2)
    x, y = dice.between(-3, 3), dice.between(-3, 3)
    turn, slant = dice.between(-0.35, 0.35), dice.between(-0.4, 0.4)
    ink = placed(glyphs, SIZE, height=height, width=stretch * height, x=x, y=y, turn=turn, slant=slant).clamp(0, 1)
    ground, paint = 255 * dice.colour(), 255 * dice.colour()
    # Ink and ground of the same brightness would be unreadable: the ink goes further away, where there is room.
    gap = paint.mean(dim=1, keepdim=True) - ground.mean(dim=1, keepdim=True)
    away = torch.where(ground.mean(dim=1, keepdim=True) < 127.5, 1.0, -1.0)
    paint = torch.where(gap.abs() < 60, (paint - gap + 90 * away).clamp(0, 255), paint)
    light = slope(SIZE, direction=dice.between(0, 2 * np.pi), strength=dice.between(0, 20))
    printed = torch.lerp(ground.expand(-1, -1, SIZE, SIZE), paint, ink) + light
    return blurred(printed, dice.between(0.2, 0.9))
