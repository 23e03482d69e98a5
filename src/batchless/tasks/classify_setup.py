"""From the settings of a run to its labelled images."""

from typing import Any

import torch
from torch import nn

from batchless.data import channel_statistics, first_images, open_images
from batchless.models import build_model
from batchless.tasks.classify import Classify, ImageData
from batchless.tasks.config import TrainConfig
from batchless.tasks.kind import Setup, TaskKind, square_size
from batchless.tasks.limits import limited

_IMAGES_FOR_STATISTICS = 500


def _set_up(config: TrainConfig) -> Setup[Any]:
    settings = config.data
    train_images, test_images = open_images(settings.root, "train"), open_images(settings.root, "test")
    statistics = channel_statistics(train_images, limit=_IMAGES_FOR_STATISTICS)
    train_images = limited(train_images, settings.train_images, first_images, seed=config.seed, name="train_images")
    test_images = limited(test_images, settings.test_images, first_images, seed=0, name="test_images")
    data = ImageData(
        train_images=train_images,
        test_images=test_images,
        image_size=settings.image_size,
        augment=settings.augment(),
        mix=settings.mix(),
        resize_to=settings.resize_shorter_side,
        statistics=statistics,
        seed=config.seed,
        workers=settings.workers,
    )
    task = Classify(data=data, label_smoothing=config.label_smoothing)
    return Setup(task=task, data=data, classes=tuple(train_images.classes), statistics=statistics)


def _build(config: TrainConfig, num_classes: int) -> nn.Module:
    return build_model(config.model, num_classes=num_classes)


def _example(config: TrainConfig, model: nn.Module) -> tuple[object, ...]:
    size = config.data.image_size
    return (torch.zeros(2, 3, size, size),)


CLASSIFICATION = TaskKind(set_up=_set_up, build=_build, example=_example, size=square_size)
"""Single images."""
