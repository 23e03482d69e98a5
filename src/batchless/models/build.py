"""Models by name, all built with plain BatchNorm; another normalizer is `batchless.convert`'s work."""

import re
from typing import Any

from torch import nn

from batchless.models.cifar_resnet import CifarResNet
from batchless.models.detectors import DETECTOR_NAMES, build_detector, is_own_detector
from batchless.models.fedbn import DigitsCNN, FedBNAlexNet
from batchless.models.names import (
    OWN_KINDS,
    SMP_KIND,
    TorchvisionTask,
    all_names,
    classifier_names,
    did_you_mean,
    is_own_name,
    timm_names,
    torchvision_names,
)
from batchless.models.segmentation_models import smp_network
from batchless.models.segmenters import build_segmenter, is_own_segmenter, segmenter_names
from batchless.models.small_images import mobilenet_for_small_images, resnet_for_small_images
from batchless.models.video import SEGMENTS, VIDEO_KINDS, on_segments, segment_kind

_KINDS = (
    "timm:<name> (such as timm:resnet18), torchvision:<name> (such as torchvision:resnet50), "
    f"cifar_resnet<depth> (such as cifar_resnet20), {OWN_KINDS}"
)
_OTHER_KINDS = "<detector>_<backbone>_fpn (such as fcos_resnet18_fpn), cifar_resnet<depth>_lraspp"
_WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
"""Of torchvision: in training they return a tuple unless told otherwise, and warn unless their initialization is chosen."""


def build_model(name: str, *, num_classes: int) -> nn.Module:
    """A classification network with random weights: images `[N, 3, H, W]` to scores `[N, num_classes]`.

    Args:
        name: `timm:<name>`, `torchvision:<name>`, `cifar_resnet<depth>`; FedBN's `digits_cnn` (28x28), `digits_cnn_32` and
            `fedbn_alexnet`; for 32x32 images `resnet18_32`, `resnet34_32`, `resnet50_32`, `mobilenet_v2_32`, each also with
            `_zero_init` after it: the last gain of every residual branch starts at 0, which `none` makes a SkipInit scalar.
        num_classes: outputs.

    Raises:
        ValueError: unknown name, with the nearest ones.

    >>> sum(parameter.numel() for parameter in build_model("cifar_resnet20", num_classes=10).parameters())
    272474
    """
    if is_own_name(name):
        return _own(name, num_classes)
    library, _, rest = name.partition(":")
    if library == "timm" and rest in timm_names(tags="." in rest):
        return _timm(rest, num_classes=num_classes)
    if library == "torchvision" and torchvision_names().get(rest) == "classification":
        options = {"aux_logits": False, "init_weights": True} if rest in _WITH_AUXILIARY_OUTPUTS else {}
        return _torchvision(rest, num_classes=num_classes, **options)
    nearest = did_you_mean(name, classifier_names(tags="." in name))
    raise ValueError(f"unknown model {name!r}{nearest}: expected {_KINDS}")


def build_video(name: str, *, num_classes: int, frames: int = SEGMENTS) -> nn.Module:
    """A network for clips with random weights.

    Args:
        name: `tsm:<2D network>`, `tsm-online:` or `tsn:`, of a network that `build_model` knows: clips `[N, T, 3, H, W]` to
            scores `[N, num_classes]`; `torchvision:<video network>`: clips `[N, 3, T, H, W]`. `clip_input` turns them.
        num_classes: outputs.
        frames: T, of 2D networks; those of torchvision take others too.

    Raises:
        ValueError: unknown name, or a 2D network that cannot be shifted.
    """
    if found := segment_kind(name):
        kind, rest = found
        return on_segments(kind, build_model(rest, num_classes=num_classes), segments=frames)
    library, _, rest = name.partition(":")
    names = torchvision_names()
    if library == "torchvision" and names.get(rest) == "video":
        return _torchvision(rest, num_classes=num_classes)
    shifted = [f"tsm:{network}" for network in classifier_names(tags=False) if "resn" in network]
    known = [*(f"torchvision:{video}" for video, task in names.items() if task == "video"), *shifted]
    nearest = did_you_mean(name, known)
    raise ValueError(f"unknown video network {name!r}{nearest}: expected {VIDEO_KINDS}")


def build_any(name: str) -> nn.Module:
    """Any network by name, as its library builds it, with random weights and without downloads: to look at or to convert.

    Args:
        name: `timm:<name>`; `torchvision:<name>` (classification, segmentation, detection, video);
            `smp:<Architecture>-<encoder>`; `tsm:<2D network>`, as `build_video` has them; or our own, as `build_model`,
            `build_segmenter` and `build_detector` have them. `example_inputs` makes what its forward takes.

    Raises:
        ValueError: unknown name, with the nearest ones; a library that is not installed, or that does not combine the two.

    >>> type(build_any("torchvision:lraspp_mobilenet_v3_large")).__name__
    'LRASPP'
    """
    if is_own_name(name):
        return build_model(name, num_classes=10)
    if is_own_segmenter(name):
        return build_segmenter(name, num_classes=10)
    if is_own_detector(name):
        return build_detector(name, num_classes=10)
    if found := segment_kind(name):
        kind, network = found
        return on_segments(kind, build_any(network))
    library, _, rest = name.partition(":")
    if library == "timm" and rest in timm_names(tags="." in rest):
        return _timm(rest)
    if library == "torchvision" and (task := torchvision_names().get(rest)) is not None:
        return _torchvision(rest, **_random_weights(rest, task))
    if name.startswith("smp:"):
        return smp_network(rest)
    nearest = did_you_mean(name, [*all_names(tags="." in name), *DETECTOR_NAMES, *segmenter_names()])
    raise ValueError(f"unknown model {name!r}{nearest}: expected {_KINDS}, {_OTHER_KINDS}, {SMP_KIND} or {VIDEO_KINDS}")


def _own(name: str, num_classes: int) -> nn.Module:
    if match := re.fullmatch(r"cifar_resnet(\d+)", name):
        return CifarResNet(int(match[1]), num_classes)
    zero_init_residual = name.endswith("_zero_init")
    match name.removesuffix("_zero_init").removesuffix("_32"):
        case "digits_cnn":
            return DigitsCNN(num_classes, image_size=32 if name.endswith("_32") else 28)
        case "fedbn_alexnet":
            return FedBNAlexNet(num_classes)
        case "mobilenet_v2":
            return mobilenet_for_small_images(num_classes, zero_init_residual=zero_init_residual)
        case resnet:
            return resnet_for_small_images(resnet, num_classes, zero_init_residual=zero_init_residual)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None, **options)
    return model


def _random_weights(name: str, task: TorchvisionTask) -> dict[str, Any]:
    """What keeps torchvision from loading a backbone, and from drawing truncated normals for tens of seconds."""
    if task in ("segmentation", "detection"):
        return {"weights_backbone": None}
    return {"init_weights": False} if name in _WITH_AUXILIARY_OUTPUTS else {}
