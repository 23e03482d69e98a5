"""The training loss of a model as far as memory is concerned: runs under fake tensors, where no value is known.

Everything but torchvision's detectors runs as it is. In a detector, which boxes go on depends on values: here its transform,
backbone, pyramid and heads run, the regions of interest in the numbers that it is configured to sample. Matching, and the
box regression losses, which are of a few boxes, are left out.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchless.models.example import example_inputs, is_detector


def input_shape(model: nn.Module, image_size: int) -> tuple[int, ...]:
    """The shape of one image (or clip) of `image_size` pixels as the network sees it, without the batch.

    A detector's own transform decides: torchvision's resizes the shorter side to 800 unless told otherwise.
    """
    images: Any
    (images,) = example_inputs(model, 1, image_size)
    if is_detector(model):
        transform: Any = model.transform
        return tuple(transform(images)[0].tensors.shape[1:])
    return tuple(images.shape[1:])


class TrainingLoss(nn.Module):
    """A model whose forward is its `training_loss`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The loss of `images` `[N, ..]`."""
        return training_loss(self.model, images)


def training_loss(model: nn.Module, images: Tensor) -> Tensor:
    """A loss over all that `model` makes of `images` `[N, ..]`: the sum of cross-entropies, the targets being class 0."""
    if not is_detector(model):
        return _sum(_cross_entropy(scores) for scores in _float_tensors(model(images)))
    detector: Any = model
    found = detector.backbone(images)
    features = list(found.values()) if isinstance(found, dict) else [found]
    if hasattr(model, "roi_heads"):
        return _two_stage_loss(detector, features, len(images))
    return _one_stage_loss(detector, features)


def _one_stage_loss(model: Any, features: list[Tensor]) -> Tensor:
    """FCOS and RetinaNet: the focal loss of every anchor and class; SSD: the cross-entropy of every anchor."""
    from torchvision.models.detection.ssd import SSD
    from torchvision.ops import sigmoid_focal_loss

    outputs = dict(model.head(features))
    scores = outputs.pop("cls_logits")
    if isinstance(model, SSD):
        loss = _cross_entropy(scores.flatten(0, 1))
    else:
        loss = _sum(sigmoid_focal_loss(image, torch.zeros_like(image), reduction="sum") for image in scores)
    total: Tensor = loss + _sum(output.sum() for output in outputs.values())
    return total


def _two_stage_loss(model: Any, features: list[Tensor], images: int) -> Tensor:
    """R-CNN: the proposals' scores; box, mask and keypoint heads on as many regions as are sampled at most."""
    heads = model.roi_heads
    sampled = heads.fg_bg_sampler.batch_size_per_image * images
    positive = int(heads.fg_bg_sampler.batch_size_per_image * heads.fg_bg_sampler.positive_fraction) * images
    loss: Tensor = _sum(output.sum() for output in _float_tensors(model.rpn.head(features)))
    regions = _pooled(heads.box_roi_pool, features, sampled)
    scores, boxes = heads.box_predictor(heads.box_head(regions))
    loss = loss + _cross_entropy(scores) + boxes.sum()
    if heads.has_mask():
        masks = heads.mask_predictor(heads.mask_head(_pooled(heads.mask_roi_pool, features, positive)))
        mask = masks[torch.arange(len(masks)), torch.zeros(len(masks), dtype=torch.long)]  # the class of each region
        loss = loss + F.binary_cross_entropy_with_logits(mask, torch.zeros_like(mask))
    if heads.has_keypoint():
        regions = _pooled(heads.keypoint_roi_pool, features, positive)
        heat = heads.keypoint_predictor(heads.keypoint_head(regions)).flatten(0, 1).flatten(1)
        valid = heat[torch.arange(len(heat))]  # a copy, as of the visible ones
        loss = loss + _cross_entropy(valid)
    return loss


def _pooled(pool: Any, features: list[Tensor], regions: int) -> Tensor:
    """`regions` regions of interest, spread evenly over the levels that `pool` looks at, which are the finest."""
    from torchvision.ops import roi_align

    levels = features[: len(pool.featmap_names)]
    parts = []
    for position, feature in enumerate(levels):
        share = regions * (position + 1) // len(levels) - regions * position // len(levels)
        boxes = feature.new_zeros(share, 5)
        parts.append(roi_align(feature, boxes, tuple(pool.output_size), sampling_ratio=pool.sampling_ratio))
    return torch.cat(parts)


def _cross_entropy(scores: Tensor) -> Tensor:
    """Of `[N, classes, ..]`; what has no classes is summed."""
    if scores.dim() < 2:
        return scores.sum()
    target = torch.zeros(scores.shape[0], *scores.shape[2:], dtype=torch.long, device=scores.device)
    return F.cross_entropy(scores, target)


def _float_tensors(output: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _sum(terms: Iterator[Tensor]) -> Tensor:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first
