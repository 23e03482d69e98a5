"""Channel statistics, with which images are normalized."""

import math
from dataclasses import dataclass
from functools import cached_property
from random import Random

import torch
from torch import Tensor

from batchless.data.dataset import ImageDataset


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Mean and standard deviation of the red, green and blue channel, of pixels from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean={self.mean}, std={self.std}: give three numbers each, for red, green and blue")
        if not all(map(math.isfinite, self.mean)) or not all(0 < std < math.inf for std in self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: means must be finite, standard deviations above 0")

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Both as float32 `[3, 1, 1]`."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32)[..., None, None]
        return mean, std


IMAGENET_STATISTICS = ChannelStatistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def normalized(images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """uint8 images `[..., 3, H, W]` as float32: `(image / 255 - mean) / std`.

    torchvision's operations, to the same bits: of a small batch its calls take as long as the pixels
    (`python -m bench federated`).
    """
    assert images.dtype == torch.uint8
    mean, std = (values.to(images.device) for values in statistics.columns)
    return images.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)


def channel_statistics(dataset: ImageDataset, *, limit: int = 2000, seed: int = 0) -> ChannelStatistics:
    """Mean and standard deviation (biased) over all pixels of up to `limit` images, chosen by the seed.

    ValueError if `limit < 1`, or if a channel has the same value in all of them.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: statistics need at least one image")
    chosen = sorted(Random(seed).sample(range(len(dataset)), min(limit, len(dataset))))
    # Integer sums are exact, so the order of the images does not matter.
    count, total, squares = 0, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for index in chosen:
        values = dataset.image(index).flatten(1).long()
        count, total, squares = count + values.shape[1], total + values.sum(dim=1), squares + values.square().sum(dim=1)
    sums = [(int(s), int(q)) for s, q in zip(total, squares, strict=True)]
    mean = [s / count / 255 for s, _ in sums]
    std = [math.sqrt(q * count - s * s) / count / 255 for s, q in sums]
    if min(std) == 0:
        raise ValueError(
            f"{len(chosen)} images from {dataset.source(chosen[0])} on: a channel has the same value everywhere (means"
            f" {[round(value, 3) for value in mean]}, standard deviations {std}); give other images or other statistics"
        )
    return ChannelStatistics(mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))
