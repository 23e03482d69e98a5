"""Networks of torchvision for 32x32 images: the ImageNet networks would have reduced these to one position halfway."""

from typing import Any

from torch import nn


def resnet_for_small_images(name: str, num_classes: int, *, zero_init_residual: bool) -> nn.Module:
    """A ResNet of torchvision's whose stem is one 3x3 convolution of stride 1: 32x32 images end as 4x4.

    Args:
        name: resnet18, resnet34, resnet50, ...
        num_classes: outputs.
        zero_init_residual: whether the last gain of each residual branch starts at 0 (arXiv 1706.02677, section 5.1);
            `convert` to `none` makes it the scalar of SkipInit.
    """
    from torchvision.models import get_model

    model: Any = get_model(name, weights=None, num_classes=num_classes, zero_init_residual=zero_init_residual)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    network: nn.Module = model
    return network


def mobilenet_for_small_images(num_classes: int, *, zero_init_residual: bool) -> nn.Module:
    """MobileNetV2 of torchvision with stride 1 in the stem and in the first stage that halves: 32x32 images end as 4x4.

    Args:
        num_classes: outputs.
        zero_init_residual: whether the last gain of each residual branch starts at 0.
    """
    from torchvision.models import mobilenet_v2
    from torchvision.models.mobilenetv2 import InvertedResidual

    # Expansion, channels, blocks, stride, as in the paper's table 2 but for the stride of the second row.
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    model: nn.Module = mobilenet_v2(weights=None, num_classes=num_classes, inverted_residual_setting=stages)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    stem.stride = (1, 1)
    if zero_init_residual:
        for block in model.modules():
            if isinstance(block, InvertedResidual) and block.use_res_connect:
                last = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]
                nn.init.zeros_(last.weight)
    return model
