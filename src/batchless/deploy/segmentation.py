"""A trained segmenter at work: how good it is on test images, and the label maps of images of the user's."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchless.data.folders import read_image
from batchless.data.label_classes import label_colours
from batchless.data.label_maps import IGNORED, LabelMaps
from batchless.data.map_loading import evaluated_image
from batchless.deploy.classes import labels_of_run
from batchless.deploy.question import PredictConfig, Prediction, image_files
from batchless.models.segmenters import resized_scores
from batchless.nn.standardized import standardized
from batchless.runs.atomic import reason
from batchless.tasks import Trained
from batchless.tasks.limits import some_images
from batchless.tasks.pictures import save_jpeg
from batchless.tasks.segment import Confusion, Segment
from batchless.tasks.segment.pictures import coloured, shares
from batchless.tasks.segment.setup import opened_maps, segmentation_data
from batchless.train import evaluate

if TYPE_CHECKING:
    from rich.console import Group


def evaluate_segmenter(trained: Trained, root: str | None, *, workers: int, device: str) -> dict[str, Any]:
    """Evaluate as the run did while training: whole images, scores resized to the size of the label maps.

    Args:
        trained: on `device`.
        root: folder of another data set with classes of the run; None: the run's own test images.
        workers: processes that prepare images.
        device: where images go.

    Returns:
        `checkpoint`, `root` (None: the embedded sample), `images`, `miou`, `pixel_accuracy` (0 to 1), `loss`; `per_class`, a
        list of `class`, `pixels`, `iou` (None where the class is neither in the data nor predicted: it is not in the mean);
        `notes`, what was found in the data.

    Raises:
        ValueError: data that cannot be used, or with other classes.
    """
    config = trained.config
    images = opened_maps(config, config.data.root if root is None else root, "test")
    notes = images.notes()
    if root is None:
        images = some_images(images, config.data.test_images, seed=0, name="test")
    images = _with_classes(images, trained.classes)
    data = replace(segmentation_data(config, images, images), statistics=trained.statistics, workers=workers)
    metric = evaluate(trained.model, Segment(data=data), data, device, precision=config.precision)
    assert isinstance(metric, Confusion)
    rows = zip(trained.classes, metric.pixels(), metric.by_class().tolist(), strict=True)
    return {
        "checkpoint": str(trained.path),
        "root": config.data.root if root is None else root,
        "images": len(images),
        **metric.compute(),
        "per_class": [
            {"class": name, "pixels": pixels, "iou": None if iou != iou else iou} for name, pixels, iou in rows
        ],
        "notes": notes,
    }


def _with_classes(images: LabelMaps, classes: tuple[str, ...]) -> LabelMaps:
    """The images with their labels in the order of `classes`; ValueError if they have a class that the run has not."""
    if images.classes == classes:
        return images
    labels = labels_of_run(images.classes, classes, source=images.source(0))
    order = torch.tensor(labels, dtype=torch.int16)
    known = (images.table >= 0) & (images.table < len(order))
    table = torch.where(known, order[images.table.long().clamp(0, len(order) - 1)], images.table)
    return replace(images, classes=classes, table=table)


def segmentation_tables(result: dict[str, Any]) -> "Group":
    """The result of `evaluate_segmenter` for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("class")  # Text: square brackets in names are no markup
    for title in ("pixels", "IoU, %"):
        table.add_column(title, justify="right")
    for row in result["per_class"]:
        iou = "-" if row["iou"] is None else f"{100 * row['iou']:.1f}"
        table.add_row(Text(row["class"]), f"{row['pixels']:,}", iou)
    source = result["root"] or "the embedded sample"
    figures = f"mIoU {100 * result['miou']:.1f} %, pixels right {100 * result['pixel_accuracy']:.1f} %"
    notes = [Text(f"note: {note}") for note in result["notes"]]
    return Group(
        Text(f"{figures}, loss {result['loss']:.3f}, on {result['images']} test images of {source}"), table, *notes
    )


def answer_of_maps(trained: Trained, config: PredictConfig) -> list[Prediction]:
    """What share of each image its classes have; the label maps go to the folder for pictures."""
    folder = None if config.pictures is None else Path(config.pictures)
    return list(map_images(trained, image_files(config.images), top=config.top, pictures=folder, device=config.device))


@torch.no_grad()
def map_images(
    trained: Trained, paths: Iterable[str | Path], *, top: int, pictures: Path | None, device: str
) -> Iterator[Prediction]:
    """The label map of each image, in the image's own size.

    Args:
        trained: a segmenter, on `device` and in evaluation mode.
        paths: image files; each is read when its turn comes.
        top: how many classes are told.
        pictures: folder for `<name>.png`, the label map with a palette (values are positions in the run's classes), and
            `<name>.jpg`, the image under its colours; None: none.
        device: where the images go.

    Raises:
        ValueError: the pictures cannot be written. An image that cannot be read gets a prediction with an `error`.
    """
    augment = trained.config.segment.augment(flip=False)
    with standardized(trained.model):
        for path in paths:
            try:
                image = read_image(path)
            except ValueError as error:
                yield Prediction(file=str(path), error=str(error))
                continue
            scores = trained.model(evaluated_image(image, augment, trained.statistics)[None].to(device)).float()
            labels = resized_scores(scores, image.shape[1:]).argmax(1)[0].to(torch.uint8).cpu()
            if pictures is not None:
                _write(image, labels, trained.classes, pictures, Path(path).stem)
            yield Prediction(file=str(path), areas=shares(labels, trained.classes)[:top])


def _write(image: Tensor, labels: Tensor, classes: tuple[str, ...], folder: Path, stem: str) -> None:
    from PIL import Image

    palette = torch.full((IGNORED + 1, 3), 255, dtype=torch.uint8)
    palette[: len(classes)] = label_colours(classes)
    label_map = Image.fromarray(labels.numpy())
    label_map.putpalette(palette.flatten().tolist())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        label_map.save(folder / f"{stem}.png")
        save_jpeg(coloured(image, labels, classes, largest_side=None), folder / f"{stem}.jpg")
    except OSError as error:
        raise ValueError(f"cannot write pictures into {folder}: {reason(error)}") from error
