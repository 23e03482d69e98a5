"""Networks that give every pixel a class, by name, all built with plain BatchNorm.

They give the scores of the last layer alone, in the size of the image: torchvision's networks answer with a dictionary, and
those of segmentation_models_pytorch take sizes that are multiples of their stride only. Auxiliary heads are left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from batchless.models.cifar_resnet import CifarResNet
from batchless.models.names import did_you_mean, torchvision_names
from batchless.models.segmentation_models import smp_network

SEGMENTER_KINDS = (
    "torchvision:<name> (such as torchvision:deeplabv3_resnet50), smp:<Architecture>-<encoder> (such as "
    "smp:DeepLabV3-resnet18), cifar_resnet<depth>_lraspp"
)
_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
"""Of DeepLabV3's dilated convolutions, by output stride (arXiv 1706.05587, section 4)."""

_SMP_MULTIPLE = 32
_LRASPP_CHANNELS = 64


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings:
    """What can be chosen of DeepLabV3 (arXiv 1706.05587); other networks are as their libraries have them.

    Attributes:
        output_stride: how much smaller than the image the last maps are, 8 or 16, with the paper's rates of dilation; None: as
            the library has it.
        multi_grid: of torchvision's DeepLabV3 on ResNets: factors of the dilation in the three blocks of the last stage, such
            as 1, 2, 4; none: as torchvision has it, whose first block has the dilation of the stage before.
    """

    output_stride: int | None = None
    multi_grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.output_stride not in (None, *_RATES):
            raise ValueError(f"output_stride must be 8, 16 or null, got {self.output_stride}")
        if self.multi_grid and (len(self.multi_grid) != 3 or min(self.multi_grid) < 1):
            raise ValueError(f"multi_grid has three factors of 1 or more, or none; got {list(self.multi_grid)}")


def segmenter_names() -> list[str]:
    """The names of torchvision's segmenters and of our own kind."""
    known = [f"torchvision:{name}" for name, task in torchvision_names().items() if task == "segmentation"]
    return [*known, *(f"cifar_resnet{depth}_lraspp" for depth in (8, 14, 20, 32, 56, 110))]


def is_own_segmenter(name: str) -> bool:
    """Whether the network is built here rather than by a library."""
    return re.fullmatch(r"cifar_resnet\d+_lraspp", name) is not None


def build_segmenter(name: str, *, num_classes: int, settings: SegmenterSettings | None = None) -> nn.Module:
    """A network with random weights: images `[N, 3, H, W]` to scores `[N, num_classes, H, W]`.

    Args:
        name: `torchvision:` and deeplabv3_resnet50, deeplabv3_resnet101, deeplabv3_mobilenet_v3_large, fcn_resnet50,
            fcn_resnet101 or lraspp_mobilenet_v3_large; `smp:<Architecture>-<encoder>`; `cifar_resnet<depth>_lraspp`, for
            small images.
        num_classes: K.
        settings: of DeepLabV3; None: the libraries'.

    Raises:
        ValueError: unknown name, with the nearest ones; a library that is not installed; settings that the network has not.

    >>> import torch
    >>> build_segmenter("cifar_resnet8_lraspp", num_classes=6).eval()(torch.zeros(1, 3, 24, 32)).shape
    torch.Size([1, 6, 24, 32])
    """
    settings = settings or SegmenterSettings()
    library, _, rest = name.partition(":")
    deeplab = re.fullmatch(r"deeplabv3_resnet(50|101)", rest) if library == "torchvision" else None
    smp_deeplab = library == "smp" and rest.startswith("DeepLabV3")
    if settings.output_stride is not None and not (deeplab or smp_deeplab):
        raise ValueError(
            f"output_stride={settings.output_stride} is a setting of DeepLabV3 on a ResNet, and {name} is none: leave it out"
        )
    if settings.multi_grid and not deeplab:
        raise ValueError(
            f"multi_grid={list(settings.multi_grid)} is a setting of torchvision:deeplabv3_resnet50 and 101, and {name} is "
            "none: leave it out"
        )
    if is_own_segmenter(name):
        return CifarLRASPP(int(name.removeprefix("cifar_resnet").removesuffix("_lraspp")), num_classes)
    if deeplab:
        return _deeplab(f"resnet{deeplab[1]}", num_classes, settings)
    if library == "torchvision" and torchvision_names().get(rest) == "segmentation":
        return _of_torchvision(rest, num_classes)
    if library == "smp":
        options: dict[str, Any] = {"classes": num_classes}
        if settings.output_stride is not None:
            options["encoder_output_stride"] = settings.output_stride
        return PaddedSegmenter(smp_network(rest, **options), multiple=_SMP_MULTIPLE)
    raise ValueError(f"unknown segmenter {name!r}{did_you_mean(name, segmenter_names())}: expected {SEGMENTER_KINDS}")


def pretrained_part(segmenter: nn.Module) -> nn.Module:
    """The part that a classifier's weights fit: torchvision's backbone, smp's encoder, else the segmenter itself."""
    if isinstance(segmenter, PaddedSegmenter):
        return segmenter.network.get_submodule("encoder")
    return segmenter.backbone if isinstance(segmenter, Segmenter) else segmenter


class Segmenter(nn.Module):
    """torchvision's backbone and head, under its own keys, with one tensor as the answer.

    Args:
        backbone: images to a dictionary of maps.
        classifier: maps to scores.
        all_maps: whether the head takes the dictionary, as LR-ASPP's does; else its entry `out`.
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module, *, all_maps: bool) -> None:
        super().__init__()
        self.backbone, self.classifier, self.all_maps = backbone, classifier, all_maps

    def forward(self, images: Tensor) -> Tensor:
        """Scores in the size of the images, enlarged bilinearly."""
        maps = self.backbone(images)
        return resized_scores(self.classifier(maps if self.all_maps else maps["out"]), images.shape[-2:])


class PaddedSegmenter(nn.Module):
    """A network that takes multiples of a size only, for images of any size: 0 is added below and to the right, and cut off.

    Args:
        network: images to scores of the same size.
        multiple: of height and width, that it takes.
    """

    def __init__(self, network: nn.Module, *, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, images: Tensor) -> Tensor:
        """Scores in the size of the images."""
        height, width = images.shape[-2:]
        below, right = -height % self.multiple, -width % self.multiple
        scores: Tensor = self.network(F.pad(images, (0, right, 0, below)))
        return scores[..., :height, :width]


def size_multiple(segmenter: nn.Module) -> int:
    """Of which height and width are after the segmenter's own padding; 1: it takes them as they are."""
    return segmenter.multiple if isinstance(segmenter, PaddedSegmenter) else 1


class CifarLRASPP(nn.Module):
    """The head of LR-ASPP (arXiv 1905.02244, section 6.3) on the ResNet of the CIFAR experiments, for small images.

    The stem halves the image, so that the first stage has half its size and the last one an eighth. The head weighs the last
    maps by a gate of the whole image, and adds the scores of the first stage: what is there comes from far, where its edge is
    from near.

    Args:
        depth: of the ResNet, 6 n + 2.
        num_classes: K.

    Shapes: `[N, 3, H, W]` to `[N, K, H, W]`.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        body = CifarResNet(depth, num_classes)
        body.conv1.stride = (2, 2)
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu)
        blocks = (depth - 2) // 6
        self.near, self.far = body.blocks[:blocks], body.blocks[blocks:]
        near, far = body.conv1.out_channels, body.fc.in_features
        self.map = nn.Sequential(
            nn.Conv2d(far, _LRASPP_CHANNELS, 1, bias=False), nn.BatchNorm2d(_LRASPP_CHANNELS), nn.ReLU(inplace=True)
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(far, _LRASPP_CHANNELS, 1, bias=False), nn.Sigmoid()
        )
        self.near_scores = nn.Conv2d(near, num_classes, 1)
        self.far_scores = nn.Conv2d(_LRASPP_CHANNELS, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores in the size of the images."""
        near = self.near(self.stem(images))
        far = self.far(near)
        far_scores = resized_scores(self.far_scores(self.map(far) * self.gate(far)), near.shape[-2:])
        return resized_scores(self.near_scores(near) + far_scores, images.shape[-2:])


def resized_scores(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Scores `[N, K, h, w]` resized bilinearly to `size`, height and width; pixels are areas, whose corners do not meet."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


def _of_torchvision(name: str, num_classes: int) -> Segmenter:
    from torchvision.models import get_model
    from torchvision.models.segmentation import LRASPP

    network = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
    return Segmenter(network.backbone, network.classifier, all_maps=isinstance(network, LRASPP))


def _deeplab(backbone: str, num_classes: int, settings: SegmenterSettings) -> Segmenter:
    from torchvision.models import get_model
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    stride = settings.output_stride or 8
    body = get_model(backbone, weights=None, replace_stride_with_dilation=[False, stride == 8, True])
    for block, factor in zip(body.layer4, settings.multi_grid, strict=bool(settings.multi_grid)):
        dilation = 32 // stride * factor
        block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    head = DeepLabHead(body.fc.in_features, num_classes, atrous_rates=_RATES[stride])
    return Segmenter(IntermediateLayerGetter(body, {"layer4": "out"}), head, all_maps=False)
