"""The residual networks of the CIFAR experiments (He et al., arXiv 1512.03385, section 4.2), built with BatchNorm."""

from typing import ClassVar

from torch import Tensor, nn

from batchless.nn.residual_block import ResidualBlock

_WIDTHS = (16, 32, 64)


class CifarBlock(ResidualBlock):
    """Two 3x3 convolutions with a shortcut; a 1x1 convolution on the shortcut where the shape changes.

    The paper pads the shortcut with zero channels there; the projection (its option B) has a normalization, so that every
    normalizer acts on every path, as in the ImageNet networks.
    """

    first_convolution: ClassVar[str] = "conv1"
    last_convolution: ClassVar[str] = "conv2"
    last_normalization: ClassVar[str] = "bn2"
    shortcut_name: ClassVar[str] = "shortcut"

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`relu(branch(x) + shortcut(x))`."""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        output: Tensor = self.relu2(branch + self.shortcut(x))
        return output


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: a 3x3 stem and three stages of (depth - 2) / 6 blocks, 16, 32 and 64 channels wide.

    Args:
        depth: 6 n + 2: 8, 20, 32, 56, 110.
        num_classes: outputs.

    Shapes: `[N, 3, H, W]` to `[N, num_classes]`; any H, W from 4 on.

    Raises:
        ValueError: a depth that is not 6 n + 2.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet's depth is 6 n + 2 (8, 14, 20, 32, 56, 110), got {depth}")
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        blocks = []
        inputs = _WIDTHS[0]
        for stage, width in enumerate(_WIDTHS):
            for block in range((depth - 2) // 6):
                blocks.append(CifarBlock(inputs, width, stride=2 if stage and not block else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        features = self.blocks(self.relu(self.bn1(self.conv1(x))))
        output: Tensor = self.fc(self.pool(features).flatten(1))
        return output
