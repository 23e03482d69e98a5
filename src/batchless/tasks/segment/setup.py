"""From the settings of a run to its images with label maps."""

from typing import Any

import torch
from torch import nn

from batchless.data import IMAGENET_STATISTICS
from batchless.data.label_maps import LabelMaps
from batchless.data.open_label_maps import Split, open_label_maps
from batchless.models.segmenters import build_segmenter, pretrained_part
from batchless.tasks.config import TrainConfig
from batchless.tasks.kind import Setup, TaskKind
from batchless.tasks.limits import some_images
from batchless.tasks.segment.task import Segment, SegmentationData

_EXAMPLE_SIDE = 64


def opened_maps(config: TrainConfig, root: str | None, split: Split) -> LabelMaps:
    """The images of a split in `root`, with the run's names and ignored values."""
    return open_label_maps(root, split, class_names=config.segment.class_names, ignore=config.segment.ignore)


def segmentation_data(config: TrainConfig, train_images: LabelMaps, test_images: LabelMaps) -> SegmentationData:
    """The batches of a segmenter's run."""
    return SegmentationData(
        train_images=train_images,
        test_images=test_images,
        augment=config.segment.augment(flip=config.data.flip),
        statistics=IMAGENET_STATISTICS,
        seed=config.seed,
        workers=config.data.workers,
    )


def _set_up(config: TrainConfig) -> Setup[Any]:
    settings = config.data
    train_images, test_images = (opened_maps(config, settings.root, split) for split in ("train", "test"))
    notes = [f"training data: {note}" for note in train_images.notes()]
    notes += [f"test data: {note}" for note in test_images.notes()]
    data = segmentation_data(
        config,
        some_images(train_images, settings.train_images, seed=config.seed, name="train"),
        some_images(test_images, settings.test_images, seed=0, name="test"),
    )
    return Setup(
        task=Segment(data=data, label_smoothing=config.label_smoothing),
        data=data,
        classes=data.classes,
        statistics=data.statistics,
        notes=tuple(notes),
    )


def _build(config: TrainConfig, num_classes: int) -> nn.Module:
    return build_segmenter(config.model, num_classes=num_classes, settings=config.segment.network())


def _sides(config: TrainConfig) -> tuple[int, int]:
    """Height and width of a training image, as far as the settings tell."""
    side = config.segment.shorter_side or _EXAMPLE_SIDE
    return config.segment.crop or (side, side)


def _example(config: TrainConfig, model: nn.Module) -> tuple[object, ...]:
    return (torch.zeros(2, 3, *_sides(config)),)


def _size(config: TrainConfig) -> tuple[str, str]:
    height, width = _sides(config)
    return f"{width}x{height}", "segment.crop, segment.shorter_side"


SEGMENTATION = TaskKind(set_up=_set_up, build=_build, example=_example, size=_size, pretrained=pretrained_part)
"""A class for every pixel."""
