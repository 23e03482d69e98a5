"""From the settings of a run to its images with objects."""

from typing import Any

from torch import nn

from batchless.data import IMAGENET_STATISTICS
from batchless.data.objects import DetectionImages
from batchless.data.open_objects import open_objects
from batchless.models.detectors import build_detector, detector_example, learns_masks
from batchless.tasks.config import TrainConfig
from batchless.tasks.detect.task import Detect, DetectionData
from batchless.tasks.kind import Setup, TaskKind
from batchless.tasks.limits import some_images


def _set_up(config: TrainConfig) -> Setup[Any]:
    settings = config.data
    train_images = some_images(
        open_objects(settings.root, "train"), settings.train_images, seed=config.seed, name="train"
    )
    test_images = some_images(open_objects(settings.root, "test"), settings.test_images, seed=0, name="test")
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


def _build(config: TrainConfig, num_classes: int) -> nn.Module:
    return build_detector(config.model, num_classes=num_classes, settings=config.detector)


def _example(config: TrainConfig, model: nn.Module) -> tuple[object, ...]:
    return detector_example()


def _size(config: TrainConfig) -> tuple[str, str]:
    side = config.detector.shorter_side
    return f"{side}x{side}", "detector.shorter_side"


def _body(model: nn.Module) -> nn.Module:
    return model.get_submodule("backbone.body")


DETECTION = TaskKind(set_up=_set_up, build=_build, example=_example, size=_size, pretrained=_body)
"""Objects, by boxes and masks."""
