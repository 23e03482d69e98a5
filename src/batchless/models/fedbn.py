"""FedBN's networks (Li et al., arXiv 2102.07623, `nets/models.py` at 2fa38ad), which FedWon removes the normalization from."""

from torch import Tensor, nn

_DIGITS_CHANNELS = 128


class DigitsCNN(nn.Module):
    """Three convolutions and three linear layers, each but the last with BatchNorm and ReLU.

    14,219,210 parameters at 28 pixels and 10 classes. BatchNorm1d after the linear layers cannot train on one image.

    Args:
        num_classes: outputs.
        image_size: height and width in pixels; the first linear layer fixes it.

    Shapes: `[N, 3, image_size, image_size]` to `[N, num_classes]`.

    Raises:
        ValueError: an image size below 4; in the forward, images of another size.
    """

    def __init__(self, num_classes: int, *, image_size: int = 28) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"digits_cnn halves its images twice: image_size is 4 or more, got {image_size}")
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, 64, 5, 1, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(64, 64, 5, 1, 2)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(64, _DIGITS_CHANNELS, 5, 1, 2)
        self.bn3 = nn.BatchNorm2d(_DIGITS_CHANNELS)
        self.relu3 = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(_DIGITS_CHANNELS * (image_size // 4) ** 2, 2048)
        self.bn4 = nn.BatchNorm1d(2048)
        self.relu4 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(2048, 512)
        self.bn5 = nn.BatchNorm1d(512)
        self.relu5 = nn.ReLU(inplace=True)
        self.fc3 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this digits_cnn is built for images of {self.image_size}x{self.image_size}, got {x.shape[-2]}x{x.shape[-1]}: "
                "set the image size, or choose digits_cnn (28) or digits_cnn_32"
            )
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        x = self.relu3(self.bn3(self.conv3(x))).flatten(1)
        x = self.relu4(self.bn4(self.fc1(x)))
        x = self.relu5(self.bn5(self.fc2(x)))
        output: Tensor = self.fc3(x)
        return output


class FedBNAlexNet(nn.Module):
    """AlexNet with BatchNorm after every layer but the last, and without dropout: 57,063,498 parameters at 10 classes.

    Args:
        num_classes: outputs.

    Shapes: `[N, 3, H, W]` to `[N, num_classes]`; H, W from 63 on, 256 in the papers.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, 4, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(3, 2)
        self.conv2 = nn.Conv2d(64, 192, 5, 1, 2)
        self.bn2 = nn.BatchNorm2d(192)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3 = nn.Conv2d(192, 384, 3, 1, 1)
        self.bn3 = nn.BatchNorm2d(384)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(384, 256, 3, 1, 1)
        self.bn4 = nn.BatchNorm2d(256)
        self.relu4 = nn.ReLU(inplace=True)
        self.conv5 = nn.Conv2d(256, 256, 3, 1, 1)
        self.bn5 = nn.BatchNorm2d(256)
        self.relu5 = nn.ReLU(inplace=True)
        self.pool5 = nn.MaxPool2d(3, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.fc1 = nn.Linear(256 * 6 * 6, 4096)
        self.bn6 = nn.BatchNorm1d(4096)
        self.relu6 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(4096, 4096)
        self.bn7 = nn.BatchNorm1d(4096)
        self.relu7 = nn.ReLU(inplace=True)
        self.fc3 = nn.Linear(4096, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        x = self.relu3(self.bn3(self.conv3(x)))
        x = self.relu4(self.bn4(self.conv4(x)))
        x = self.pool5(self.relu5(self.bn5(self.conv5(x))))
        x = self.avgpool(x).flatten(1)
        x = self.relu6(self.bn6(self.fc1(x)))
        x = self.relu7(self.bn7(self.fc2(x)))
        output: Tensor = self.fc3(x)
        return output
