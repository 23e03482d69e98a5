"""Random inputs of the form that a model's forward takes: images, lists of images, clips."""

import torch
from torch import Tensor, nn

from batchless.models.detectors import is_own_detector
from batchless.models.names import torchvision_names
from batchless.models.temporal_shift import SegmentNetwork
from batchless.models.video import SEGMENTS, is_3d, segment_kind

FRAMES = 16
"""Of a clip: what torchvision's video networks are built for or do with."""

_KEYPOINTS = 17
"""Of a person in COCO: what torchvision's keypoint detector is built for."""


def example_inputs(
    model: nn.Module | str, images: int, image_size: int, *, training: bool = False
) -> tuple[object, ...]:
    """Positional arguments of `model`'s forward, the same values in [0, 1) at every call.

    torchvision's detectors take a list of images `[3, S, S]`, and in training a list of targets; video networks whose first
    convolution has three dimensions clips `[N, 3, 16, S, S]`; 2D networks on every frame (`SegmentNetwork`) clips
    `[N, T, 3, S, S]`; all others images `[N, 3, S, S]`.

    Args:
        model: a model, or a name that `build_any` knows.
        images: N.
        image_size: S, in pixels.
        training: whether detectors get targets.

    >>> [tuple(x.shape) for x in example_inputs("torchvision:r3d_18", images=2, image_size=112)]
    [(2, 3, 16, 112, 112)]
    """
    segments: int | None = None
    if isinstance(model, str):
        library, _, rest = model.partition(":")
        task = torchvision_names().get(rest) if library == "torchvision" else None
        detects, video = task == "detection" or is_own_detector(model), task == "video"
        segments = SEGMENTS if segment_kind(model) else None
    else:
        detects, video = is_detector(model), is_3d(model)
        segments = model.segments if isinstance(model, SegmentNetwork) else None
    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, FRAMES) if video else (images, 3) if segments is None else (images, segments, 3)
    batch = torch.rand(*shape, image_size, image_size, generator=generator)
    if not detects:
        return (batch,)
    pictures = list(batch)
    return (pictures, detection_targets(pictures)) if training else (pictures,)


def is_detector(model: nn.Module) -> bool:
    """Whether the model is one of torchvision's detectors, which take a list of images and in training targets."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.ssd import SSD

    return isinstance(model, GeneralizedRCNN | FCOS | RetinaNet | SSD)


def detection_targets(images: list[Tensor]) -> list[dict[str, Tensor]]:
    """For each image `[C, H, W]` one object of class 1 in the middle: its box, mask and keypoints."""
    targets = []
    for image in images:
        height, width = image.shape[-2:]
        top, left, bottom, right = height // 4, width // 4, height * 3 // 4, width * 3 // 4
        mask = torch.zeros(1, height, width, dtype=torch.uint8, device=image.device)
        mask[:, top:bottom, left:right] = 1
        box = torch.tensor([[left, top, right, bottom]], dtype=torch.float32, device=image.device)
        points = torch.tensor([[[left + 1.0, top + 1.0, 1.0]] * _KEYPOINTS], device=image.device)
        label = torch.ones(1, dtype=torch.long, device=image.device)
        targets.append({"boxes": box, "labels": label, "masks": mask, "keypoints": points})
    return targets


def built_for(model: nn.Module) -> str:
    """` (it is built for 256)`: the size of images that a model of timm or torchvision names; "" where it names none."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    size = getattr(model, "image_size", None) or settings.get("input_size", (None,))[-1]
    return f" (it is built for {size})" if isinstance(size, int) else ""
