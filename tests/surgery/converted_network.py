"""The networks and layers that the tests of conversion share."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.surgery import ConversionReport

ACTS = ("bn", "frozen-bn", "sync-bn", "gn", "ln", "in", "bcn", "bcn-micro", "none")


WEIGHTS = ("ws", "sws", "wn", "cwn")


class Gate(nn.Module):
    """Squeeze-excite: convolutions that no normalization follows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Block(nn.Module):
    """A residual block with a projection, and functional activations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.gate = Gate(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    """Stem, block, a predictor of maps, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = Block(8, 12)
        self.maps = nn.Conv2d(12, 2, 1)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(self.stem(x))
        return self.classifier(x.mean((2, 3))), self.maps(x)


FOLLOWED = {"stem.0", "block.conv1", "block.conv2", "block.shortcut.0"}


NORMS = {"stem.1", "block.bn1", "block.bn2", "block.shortcut.1"}


ALONE = {"block.gate.reduce", "block.gate.expand", "maps"}


def images(samples: int = 2, size: int = 10) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))


def kinds(model: nn.Module, names: set[str]) -> set[type[nn.Module]]:
    return {type(model.get_submodule(name)) for name in names}


def details(report: ConversionReport, *names: str) -> list[str]:
    found = {entry.name: entry.detail for entry in report.entries}
    return [found[name] for name in names]


def sole_error(message: str) -> str:
    assert "\n" not in message
    return message


by_example_and_structure = pytest.mark.parametrize("example", [images(), None], ids=["example", "structure"])


class NamedConv(nn.Conv2d):
    """A subclass that computes what its base does."""


class DoubledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class NamedNorm(nn.BatchNorm2d):
    """A subclass that computes what its base does."""


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class CallsByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(input=x))


class TrainingHead(nn.Module):
    """A head that runs only in training, where an example in evaluation mode does not get."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(self.bn(self.conv(x)))
        return (y, self.head(y)) if self.training else (y,)
