"""From the settings of a run to its clips."""

from typing import Any

import torch
from torch import nn

from batchless.data import channel_statistics
from batchless.data.clips import MiddleFrames, first_clips, open_clips
from batchless.models import build_video
from batchless.models.video import clip_input
from batchless.tasks.config import TrainConfig
from batchless.tasks.kind import Setup, TaskKind, square_size
from batchless.tasks.limits import limited
from batchless.tasks.video.classify_clips import ClassifyClips, ClipData

_CLIPS_FOR_STATISTICS = 200


def open_clip_data(config: TrainConfig) -> ClipData:
    """The run's clips; ValueError if there are none, or not as many as are wanted."""
    settings = config.data
    train_clips, test_clips = open_clips(settings.root, "train"), open_clips(settings.root, "test")
    statistics = channel_statistics(MiddleFrames(clips=train_clips), limit=_CLIPS_FOR_STATISTICS)
    return ClipData(
        train_clips=limited(train_clips, settings.train_images, first_clips, seed=config.seed, name="train_images"),
        test_clips=limited(test_clips, settings.test_images, first_clips, seed=0, name="test_images"),
        image_size=settings.image_size,
        sampling=config.video,
        augment=settings.augment(),
        statistics=statistics,
        seed=config.seed,
        resize_to=settings.resize_shorter_side,
        workers=settings.workers,
    )


def _set_up(config: TrainConfig) -> Setup[Any]:
    data = open_clip_data(config)
    task = ClassifyClips(data=data, label_smoothing=config.label_smoothing)
    return Setup(task=task, data=data, classes=data.classes, statistics=data.statistics)


def _build(config: TrainConfig, num_classes: int) -> nn.Module:
    return build_video(config.model, num_classes=num_classes, frames=config.video.frames)


def _example(config: TrainConfig, model: nn.Module) -> tuple[object, ...]:
    size = config.data.image_size
    return (clip_input(model, torch.zeros(2, config.video.frames, 3, size, size)),)


VIDEO = TaskKind(set_up=_set_up, build=_build, example=_example, size=square_size)
"""Clips."""
