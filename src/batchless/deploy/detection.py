"""A trained detector at work: how good it is on test images, and what it finds in images of the user's."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from batchless.data.folders import read_image
from batchless.data.objects import DetectionImages
from batchless.data.open_objects import open_objects
from batchless.deploy.classes import labels_of_run
from batchless.deploy.question import FoundObject, PredictConfig, Prediction, image_files
from batchless.models.detectors import learns_masks
from batchless.nn.standardized import standardized
from batchless.runs.atomic import reason
from batchless.tasks import Trained
from batchless.tasks.detect import AveragePrecision, Detect
from batchless.tasks.detect.average_precision import detections
from batchless.tasks.detect.pictures import drawn
from batchless.tasks.detect.setup import detection_data
from batchless.tasks.limits import some_images
from batchless.tasks.pictures import save_jpeg
from batchless.train import evaluate

if TYPE_CHECKING:
    from rich.console import Group


def evaluate_detector(trained: Trained, root: str | None, *, workers: int, device: str) -> dict[str, Any]:
    """Evaluate as the run did while training.

    Args:
        trained: on `device`.
        root: folder of another data set with the run's classes; None: the run's own test images.
        workers: processes that prepare images.
        device: where images go.

    Returns:
        `checkpoint`, `root` (None: the embedded sample), `images`, and `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`,
        `ap_large` (0 to 1; a size without an object is absent), with masks `mask_ap`, ... too; `per_class`, a list of `class`,
        `objects`, `ap` and with masks `mask_ap` (None without objects); `notes`, what was found in the annotations.

    Raises:
        ValueError: data that cannot be used, or with other classes.
    """
    config = trained.config
    images = open_objects(config.data.root if root is None else root, "test")
    if root is None:
        images = some_images(images, config.data.test_images, seed=0, name="test")
    images = _with_classes(images, trained.classes)
    data = detection_data(config, images, images)
    data = replace(data, workers=workers)
    metric = evaluate(trained.model, Detect(data=data), data, device, precision=config.precision)
    assert isinstance(metric, AveragePrecision)
    boxes, masks = metric.precision("box"), metric.precision("mask") if data.masks else None
    counts = torch.zeros(len(trained.classes), dtype=torch.long)
    for image in images.images:
        counts += image.labels[~image.crowd].bincount(minlength=len(counts))
    per_class = [
        {"class": name, "objects": int(counts[label]), "ap": boxes.of_class(label)}
        | ({} if masks is None else {"mask_ap": masks.of_class(label)})
        for label, name in enumerate(trained.classes)
    ]
    root = config.data.root if root is None else root
    about = {"checkpoint": str(trained.path), "root": root, "images": len(images)}
    return about | metric.compute() | {"per_class": per_class, "notes": images.notes()}


def _with_classes(images: DetectionImages, classes: tuple[str, ...]) -> DetectionImages:
    """The images with their labels in the order of `classes`; ValueError if they have a class that the run has not."""
    if images.classes == classes:
        return images
    labels = labels_of_run(images.classes, classes, source=images.images[0].source)
    order = torch.tensor(labels, dtype=torch.long)
    relabelled = tuple(replace(image, labels=order[image.labels]) for image in images.images)
    return replace(images, images=relabelled, classes=classes)


def detection_tables(result: dict[str, Any]) -> "Group":
    """The result of `evaluate_detector` for the terminal: all figures, and those of each class."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    masks = "mask_ap" in result
    table, classes = Table("AP, %"), Table("class")  # Text: square brackets in names are no markup
    for kind in ("boxes", "masks") if masks else ("boxes",):
        table.add_column(kind, justify="right")
    for title in ("objects", "AP, %", *(["mask AP, %"] if masks else [])):
        classes.add_column(title, justify="right")
    names = {"ap": "0.50 to 0.95", "ap50": "0.50", "ap75": "0.75"} | {
        f"ap_{size}": f"{size} objects" for size in ("small", "medium", "large")
    }
    for key, name in names.items():
        if key in result:
            values = [result[key], *([result.get(f"mask_{key}")] if masks else [])]
            table.add_row(name, *map(_percent, values))
    for row in result["per_class"]:
        if row["objects"]:
            values = [row["ap"], *([row["mask_ap"]] if masks else [])]
            classes.add_row(Text(row["class"]), str(row["objects"]), *map(_percent, values))
    source = result["root"] or "the embedded sample"
    notes = [Text(f"note: {note}") for note in result["notes"]]
    return Group(
        Text(f"AP {_percent(result['ap'])} %, on {result['images']} test images of {source}"), table, classes, *notes
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def answer_of_objects(trained: Trained, config: PredictConfig) -> list[Prediction]:
    """The objects in the images asked about."""
    found = find_objects(
        trained,
        image_files(config.images),
        threshold=config.threshold,
        pictures=None if config.pictures is None else Path(config.pictures),
        device=config.device,
    )
    return [Prediction(file=file, objects=objects, error=error) for file, objects, error in found]


@torch.no_grad()
def find_objects(
    trained: Trained, paths: Iterable[str | Path], *, threshold: float, pictures: Path | None, device: str
) -> Iterator[tuple[str, tuple[FoundObject, ...], str | None]]:
    """For each image its file, its objects of at least that score, the surest first, and why it could not be read (or None).

    Args:
        trained: a detector, on `device` and in evaluation mode.
        paths: image files; each is read when its turn comes.
        threshold: smallest score.
        pictures: folder into which each image is drawn with what was found, as `<name>.jpg`; None: none.
        device: where the images go.

    Raises:
        ValueError: the pictures cannot be written.
    """
    with standardized(trained.model):
        for path in paths:
            try:
                image = read_image(path)
            except ValueError as error:
                yield str(path), (), str(error)
                continue
            yield str(path), _found(trained, image, Path(path), threshold, pictures, device), None


def _found(
    trained: Trained, image: Tensor, path: Path, threshold: float, pictures: Path | None, device: str
) -> tuple[FoundObject, ...]:
    scaled = functional.to_dtype(image, torch.float32, scale=True).to(device)
    found = detections(trained.model([scaled])[0], masks=learns_masks(trained.config.model))
    if pictures is not None:
        try:
            pictures.mkdir(parents=True, exist_ok=True)
            save_jpeg(drawn(image, found, trained.classes, threshold=threshold), pictures / f"{path.stem}.jpg")
        except OSError as error:
            raise ValueError(f"cannot write pictures into {pictures}: {reason(error)}") from error
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return tuple(
        FoundObject(name=trained.classes[label], score=score, box=(box[0], box[1], box[2], box[3]))
        for label, score, box in rows
        if score >= threshold
    )
