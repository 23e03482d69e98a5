"""torchvision's detectors on ResNet and ResNeXt pyramids, every convolution that can have one with a BatchNorm after it.

Where the normalizations are is the authors' choice (joe-siyuan-qiao/maskrcnn-benchmark): backbone, pyramid, the four
convolutions of the box head and of the mask head, the towers of one-stage heads. The region proposal network, the box and
mask predictors, and the two coarsest levels of one-stage pyramids have none, so that `convert` leaves them plain.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from batchless.data.object_loading import resized_size
from batchless.data.statistics import IMAGENET_STATISTICS
from batchless.models.names import did_you_mean

Architecture = Literal["fasterrcnn", "maskrcnn", "retinanet", "fcos"]
_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d")
DETECTOR_NAMES = [
    f"{architecture}_{backbone}_fpn" for architecture in get_args(Architecture) for backbone in _BACKBONES
]


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Sizes of a detector; the defaults are the published networks'.

    Attributes:
        shorter_side: of an image when it is evaluated, in pixels.
        longest_side: where the longer side would exceed it, the image becomes smaller instead.
        stages: of the backbone that are used, 2 to 4; the fourth sees small images as a few positions.
        channels: of the pyramid and of the heads' convolutions.
        box_features: outputs of the box head's linear layer; of R-CNNs.
        rois_per_image: region proposals that an R-CNN learns from in each image.
        proposals_per_image: region proposals that an R-CNN keeps in each image.
        smallest_anchor: side of the anchors on the finest level, in pixels; it doubles from level to level. FCOS has none.
        detections_per_image: the best ones are kept; COCO counts 100.
        score_threshold: detections below it are dropped.
    """

    shorter_side: int = 800
    longest_side: int = 1333
    stages: int = 4
    channels: int = 256
    box_features: int = 1024
    rois_per_image: int = 512
    proposals_per_image: int = 1000
    smallest_anchor: int = 32
    detections_per_image: int = 100
    score_threshold: float = 0.05

    def __post_init__(self) -> None:
        for name in (
            "shorter_side",
            "channels",
            "box_features",
            "rois_per_image",
            "proposals_per_image",
            "smallest_anchor",
            "detections_per_image",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 2 <= self.stages <= 4:
            raise ValueError(f"stages must be 2, 3 or 4, got {self.stages}")
        if self.longest_side < self.shorter_side:
            raise ValueError(
                f"longest_side must be {self.shorter_side} (shorter_side) or more, got {self.longest_side}"
            )
        if not 0 <= self.score_threshold < 1:
            raise ValueError(f"score_threshold must be in [0, 1), got {self.score_threshold}")


class DetectorInput(nn.Module):
    """What stands before a detector's backbone: resizing in evaluation, normalization, one padded tensor.

    torchvision's own transform resizes without antialiasing, and draws training sizes from the global random state. Here
    training images come resized (`batchless.data.object_loading`), and evaluation resizes as that does, unless `resizes` is set
    to False: then they come resized there too.
    """

    def __init__(self, settings: DetectorSettings) -> None:
        super().__init__()
        from torchvision.models.detection.transform import GeneralizedRCNNTransform

        self.settings = settings
        self.resizes = True
        self.plain = GeneralizedRCNNTransform(
            settings.shorter_side, settings.longest_side, IMAGENET_STATISTICS.mean, IMAGENET_STATISTICS.std
        )

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[Any, list[dict[str, Tensor]] | None]:
        """Images float `[3, H, W]` from 0 to 1 as an `ImageList`; targets as they are (in evaluation they are not used)."""
        from torchvision.models.detection.image_list import ImageList

        if self.resizes and not self.training:
            images = [self._resized(image) for image in images]
        images = [self.plain.normalize(image) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return ImageList(self.plain.batch_images(images), sizes), targets

    def _resized(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        settings = self.settings
        size = resized_size(height, width, shorter_side=settings.shorter_side, longest_side=settings.longest_side)
        if size == (height, width):
            return image
        result: Tensor = functional.resize(image, list(size), antialias=True)
        return result

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Boxes and masks in the pixels of the original images."""
        return self.plain.postprocess(result, image_shapes, original_image_sizes)


def is_own_detector(name: str) -> bool:
    """Whether `build_detector` knows the name."""
    return name in DETECTOR_NAMES


def build_detector(name: str, *, num_classes: int, settings: DetectorSettings | None = None) -> nn.Module:
    """A detector with random weights; class 0 is the background, the classes are 1 to `num_classes`.

    In training `model(images, targets)` gives the losses by name, in evaluation `model(images)` a dictionary of `boxes`,
    `labels`, `scores` and `masks` for each image, as torchvision's detectors do. RetinaNet and FCOS need no background:
    there class 0 never occurs, as in torchvision's own weights.

    Args:
        name: `<architecture>_<backbone>_fpn`: fasterrcnn, maskrcnn, retinanet or fcos, on resnet18, resnet34, resnet50,
            resnet101, resnext50_32x4d or resnext101_32x4d.
        num_classes: without the background.
        settings: sizes; None: the published networks'.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    match = re.fullmatch(rf"({'|'.join(get_args(Architecture))})_({'|'.join(_BACKBONES)})_fpn", name)
    if match is None:
        raise ValueError(
            f"unknown detector {name!r}{did_you_mean(name, DETECTOR_NAMES)}: expected <architecture>_<backbone>_fpn with one "
            f"of {', '.join(get_args(Architecture))} and one of {', '.join(_BACKBONES)}"
        )
    architecture, backbone = match.groups()
    settings = settings or DetectorSettings()
    build = {"fasterrcnn": _rcnn, "maskrcnn": _rcnn, "retinanet": _retinanet, "fcos": _fcos}[architecture]
    detector = build(architecture, backbone, num_classes + 1, settings)
    detector.transform = DetectorInput(settings)
    network: nn.Module = detector
    return network


def learns_masks(name: str) -> bool:
    """Whether the detector of that name has masks."""
    return name.startswith("maskrcnn_")


def _pyramid(backbone: str, settings: DetectorSettings, *, first: int, extra: nn.Module) -> nn.Module:
    """The backbone's stages from `first` on (1 to 4: strides 4 to 32), and what `extra` adds above them."""
    from torchvision.models import get_model
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import Bottleneck, ResNet

    body: Any
    if backbone == "resnext101_32x4d":  # torchvision has it with 32x8d and 64x4d only
        body = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, norm_layer=nn.BatchNorm2d)
    else:
        body = get_model(backbone, weights=None, norm_layer=nn.BatchNorm2d)
    levels = range(first, settings.stages + 1)
    widths = [body.inplanes // 8 * 2 ** (level - 1) for level in levels]
    names = {f"layer{level}": str(number) for number, level in enumerate(levels)}
    pyramid: nn.Module = BackboneWithFPN(body, names, widths, settings.channels, extra, nn.BatchNorm2d)
    return pyramid


def _anchors(settings: DetectorSettings, *, levels: int, octaves: tuple[float, ...]) -> Any:
    """Anchors of three shapes, `octaves` sizes on each level."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = tuple(tuple(settings.smallest_anchor * 2**level * octave for octave in octaves) for level in range(levels))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * levels)


def _rcnn(architecture: str, backbone: str, classes: int, settings: DetectorSettings) -> Any:
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    channels = settings.channels
    anchors = _anchors(settings, levels=settings.stages + 1, octaves=(1.0,))
    options: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(channels, anchors.num_anchors_per_location()[0]),
        "rpn_pre_nms_top_n_train": 2 * settings.proposals_per_image,
        "rpn_post_nms_top_n_train": 2 * settings.proposals_per_image,
        "rpn_pre_nms_top_n_test": settings.proposals_per_image,
        "rpn_post_nms_top_n_test": settings.proposals_per_image,
        "box_head": FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [settings.box_features], nn.BatchNorm2d),
        "box_batch_size_per_image": settings.rois_per_image,
        "box_detections_per_img": settings.detections_per_image,
        "box_score_thresh": settings.score_threshold,
    }
    build: Callable[..., Any] = FasterRCNN
    if architecture == "maskrcnn":
        build = MaskRCNN
        options["mask_head"] = MaskRCNNHeads(channels, [channels] * 4, 1, nn.BatchNorm2d)
        options["mask_predictor"] = MaskRCNNPredictor(channels, channels, classes)
    pyramid = _pyramid(backbone, settings, first=1, extra=LastLevelMaxPool())
    return build(pyramid, box_predictor=FastRCNNPredictor(settings.box_features, classes), **options)


def _retinanet(architecture: str, backbone: str, classes: int, settings: DetectorSettings) -> Any:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.retinanet import RetinaNetHead

    anchors = _anchors(settings, levels=settings.stages + 1, octaves=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)))
    head = RetinaNetHead(settings.channels, anchors.num_anchors_per_location()[0], classes, nn.BatchNorm2d)
    return RetinaNet(
        _one_stage_pyramid(backbone, settings),
        classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=settings.score_threshold,
        detections_per_img=settings.detections_per_image,
    )


def _fcos(architecture: str, backbone: str, classes: int, settings: DetectorSettings) -> Any:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

    channels = settings.channels
    # Of 32 channels for its group normalizations, which are replaced at once.
    head = FCOSHead(32, 1, classes)
    head.classification_head = FCOSClassificationHead(channels, 1, classes, norm_layer=nn.BatchNorm2d)
    head.regression_head = FCOSRegressionHead(channels, 1, norm_layer=nn.BatchNorm2d)
    return FCOS(
        _one_stage_pyramid(backbone, settings),
        classes,
        anchor_generator=_points(settings),
        head=head,
        score_thresh=settings.score_threshold,
        detections_per_img=settings.detections_per_image,
    )


def _points(settings: DetectorSettings) -> Any:
    """FCOS's places: one on each position, with the level's stride, by which objects are dealt out to levels."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    levels = settings.stages + 1
    return AnchorGenerator(tuple((8 * 2**level,) for level in range(levels)), ((1.0,),) * levels)


def _one_stage_pyramid(backbone: str, settings: DetectorSettings) -> nn.Module:
    """Strides from 8 on: stages from 2 on, and two more levels by convolutions of stride 2 that have no normalization."""
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    extra = LastLevelP6P7(settings.channels, settings.channels)
    return _pyramid(backbone, settings, first=2, extra=extra)


def detector_example() -> tuple[list[Tensor]]:
    """What a detector's forward takes in evaluation: one small image, which it enlarges to its own size."""
    return ([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))],)
