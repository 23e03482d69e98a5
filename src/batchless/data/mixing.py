"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) for micro-batches of any size.

The papers blend an image with another one of its batch. Here it is another one of the dataset, chosen by the sample's own
random numbers, so that micro-batches of one image can be mixed and their size changes nothing. The price: a second image
is decoded for each mixed sample.
"""

import math
from dataclasses import dataclass
from random import Random

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How training images are blended in pairs: `lambda ~ Beta(alpha, alpha)` is the share of the image itself.

    Mixup: `lambda x + (1 - lambda) y`. CutMix: a box of y in x, with sides `sqrt(1 - lambda)` of the image's and a uniform
    centre; cut off at the border, and lambda becomes the share that is left of x. Labels: `lambda l_x + (1 - lambda) l_y`.

    Attributes:
        mixup: alpha of mixup; 0: none. 0.2 on ImageNet and 1 on CIFAR in the paper.
        cutmix: alpha of CutMix; 0: none. 1 in the paper. With both, a fair coin chooses for each image.
        probability: share of the images that are blended at all.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: give the alpha of a Beta distribution, above 0, or 0 for none")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability}: give a share from 0 to 1")

    def draw(self, size: int, *, rng: Random) -> "Blend | None":
        """How to blend an image of `size` x `size` pixels with its partner; None: not at all."""
        if not (self.mixup or self.cutmix) or rng.random() >= self.probability:
            return None
        if self.cutmix and (not self.mixup or rng.random() < 0.5):
            return _box(size, rng.betavariate(self.cutmix, self.cutmix), rng=rng)
        return Blend(share=rng.betavariate(self.mixup, self.mixup))


@dataclass(frozen=True, kw_only=True)
class Blend:
    """One drawn blend of an image with its partner.

    Attributes:
        share: lambda, what counts of the image itself.
        box: top, bottom, left and right of the part that the partner fills (CutMix); None: everywhere, faintly (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def mixed(image: Tensor, partner: Tensor, blend: Blend) -> Tensor:
    """The blend of two images `[3, S, S]`."""
    if blend.box is None:
        return blend.share * image + (1 - blend.share) * partner
    top, bottom, left, right = blend.box
    result = image.clone()
    result[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return result


def _box(size: int, share: float, *, rng: Random) -> Blend:
    """CutMix's box, as the authors' code rounds it (github.com/clovaai/CutMix-PyTorch, `rand_bbox`)."""
    half = int(size * math.sqrt(1 - share)) // 2
    vertical, horizontal = rng.randrange(size), rng.randrange(size)
    top, bottom = max(vertical - half, 0), min(vertical + half, size)
    left, right = max(horizontal - half, 0), min(horizontal + half, size)
    return Blend(share=1 - (bottom - top) * (right - left) / size**2, box=(top, bottom, left, right))
