"""A task of seconds that several test files train on: ten random images in three classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import batchless as bl
from batchless.train import LoopSettings, OptimizerSettings

IMAGES_PER_EPOCH = 10


@dataclass
class TinyData:
    """Ten random images of three classes and seven test images; remembers which were asked for."""

    dtype: torch.dtype = torch.float64
    asked: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(IMAGES_PER_EPOCH + 7, 3, 6, 6, generator=generator, dtype=self.dtype)
        self.labels = torch.randint(3, (len(self.images),), generator=generator)

    def order(self, epoch: int) -> list[int]:
        return torch.randperm(IMAGES_PER_EPOCH, generator=torch.Generator().manual_seed(epoch)).tolist()

    def train(self, epoch: int, micro_batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        self.asked.append((epoch, sum(map(len, micro_batches))))
        for part in micro_batches:
            yield self.images[list(part)], self.labels[list(part)]

    @property
    def test_images_count(self) -> int:
        return len(self.images) - IMAGES_PER_EPOCH

    def test(self, part: range) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(part.start, part.stop).split(3):
            yield self.images[IMAGES_PER_EPOCH + index], self.labels[IMAGES_PER_EPOCH + index]


def tiny_model(normalizer: str = "gn+ws", *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (3, 8):
        layers += [nn.Conv2d(inputs, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).to(dtype)
    return bl.convert(model, normalizer, example=torch.zeros(1, 3, 6, 6, dtype=dtype))[0]


def settings(**changes: object) -> LoopSettings:
    """27 images are two epochs and seven images of a third: steps of 4 4 2, 4 4 2, 4 3."""
    optimizer = changes.pop("optimizer", OptimizerSettings(warmup=0.2))
    values = {"images": 27, "images_per_forward": 2, "images_per_step": 4, "evaluations": 2} | changes
    return LoopSettings(optimizer=optimizer, **values)
