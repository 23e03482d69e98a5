"""What each task makes of a configuration: its data and its loss, metric and pictures."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic

from batchless.data import (
    IMAGENET_STATISTICS,
    ChannelStatistics,
    ImageDataset,
    channel_statistics,
    epoch_order,
    first_images,
    open_images,
)
from batchless.data.objects import DetectionImages
from batchless.data.open_objects import open_objects
from batchless.models.detectors import learns_masks
from batchless.tasks.classify import Classify, ImageData
from batchless.tasks.config import TrainConfig
from batchless.tasks.detect import Detect, DetectionData
from batchless.tasks.video import ClassifyClips, open_clip_data
from batchless.train.task import Batch, Data, Task


@dataclass(frozen=True, kw_only=True)
class Setup(Generic[Batch]):
    """A task with its data.

    Attributes:
        task: what is learned.
        data: the batches.
        classes: their names, in the order of the labels.
        statistics: by which images are normalized.
        notes: what was found in the data, a sentence each.
    """

    task: Task[Batch]
    data: Data[Batch]
    classes: tuple[str, ...]
    statistics: ChannelStatistics
    notes: tuple[str, ...] = ()


def set_up(config: TrainConfig) -> Setup[Any]:
    """The configured task on the configured data.

    Raises:
        ValueError: data that is missing, damaged or of another kind, or settings that do not fit them.
    """
    build: Callable[[TrainConfig], Setup[Any]] = {
        "classify": _classify,
        "detect": _detect,
        "video": _video,
    }[config.task]
    return build(config)


def _classify(config: TrainConfig) -> Setup[Any]:
    settings = config.data
    train_images, test_images = open_images(settings.root, "train"), open_images(settings.root, "test")
    statistics = channel_statistics(train_images, limit=500)
    train_images = _limited(train_images, settings.train_images, seed=config.seed, name="train_images")
    test_images = _limited(test_images, settings.test_images, seed=0, name="test_images")
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


def _limited(images: ImageDataset, count: int | None, *, seed: int, name: str) -> ImageDataset:
    if count is None:
        return images
    try:
        return first_images(images, count, seed=seed)
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from error


def _detect(config: TrainConfig) -> Setup[Any]:
    settings = config.data
    train_images = some_objects(
        open_objects(settings.root, "train"), settings.train_images, seed=config.seed, name="train"
    )
    test_images = some_objects(open_objects(settings.root, "test"), settings.test_images, seed=0, name="test")
    data = detection_data(config, train_images, test_images)
    notes = [f"training data: {note}" for note in train_images.notes()]
    notes += [f"test data: {note}" for note in test_images.notes()]
    return Setup(
        task=Detect(data=data),
        data=data,
        classes=train_images.classes,
        statistics=IMAGENET_STATISTICS,
        notes=tuple(notes),
    )


def _video(config: TrainConfig) -> Setup[Any]:
    data = open_clip_data(config)
    task = ClassifyClips(data=data, label_smoothing=config.label_smoothing)
    return Setup(task=task, data=data, classes=data.classes, statistics=data.statistics)


def detection_data(config: TrainConfig, train_images: DetectionImages, test_images: DetectionImages) -> DetectionData:
    """The batches of a detector's run.

    Raises:
        ValueError: the data sets have other classes than each other, no objects, or no masks for a detector that learns them.
    """
    masks = learns_masks(config.model)
    for images, what in ((train_images, "training"), (test_images, "test")):
        images.require_objects(what)
        if masks and not images.has_masks:
            raise ValueError(
                f"{config.model} learns masks and the {what} data have boxes only: choose fasterrcnn, retinanet or fcos"
            )
    if train_images.classes != test_images.classes:
        raise ValueError(
            f"training and test data have other classes: {', '.join(train_images.classes[:5])}, ... and "
            f"{', '.join(test_images.classes[:5])}, ...: give both the same categories"
        )
    return DetectionData(
        train_images=train_images,
        test_images=test_images,
        augment=config.data.object_augment(config.detector),
        images_per_forward=config.images_per_forward,
        masks=masks,
        seed=config.seed,
        workers=config.data.workers,
    )


def some_objects(images: DetectionImages, count: int | None, *, seed: int, name: str) -> DetectionImages:
    """The first `count` images of a seeded order, in their own order; all with None.

    Raises:
        ValueError: there are fewer.
    """
    if count is None:
        return images
    if count > len(images):
        raise ValueError(f"data.{name}_images={count}: the data set has {len(images)} {name} images")
    chosen = sorted(epoch_order(len(images), seed=seed, epoch=0)[:count])
    return replace(images, images=tuple(images.images[index] for index in chosen))
