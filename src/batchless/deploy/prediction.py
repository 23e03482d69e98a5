"""What a trained network says about images of the user's."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from batchless.data.folders import read_image
from batchless.deploy.clip_prediction import clip_paths, predict_clips
from batchless.deploy.detection import FoundObject, find_objects
from batchless.deploy.images import as_evaluated, network_input
from batchless.nn.standardized import standardized
from batchless.runs.atomic import write_text
from batchless.tasks import Trained, load_trained

if TYPE_CHECKING:
    from rich.table import Table

_IMAGES_PER_FORWARD = 32


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What `batchless predict` looks at.

    Attributes:
        checkpoint: of a run.
        images: files, and folders of which all images directly in them are taken; of a run on clips, video files, folders of
            frames, and folders of video files.
        top: how many classes are told for each image.
        threshold: of a detector: the smallest score of an object that is told.
        pictures: folder for pictures: of a detector, the images with what was found; of a run on clips, a strip of frames of
            each; None: none.
        device: cpu or cuda.
        out: file to write, with one JSON object per image and line; None: none.
    """

    checkpoint: str
    images: tuple[str, ...]
    top: int = 3
    threshold: float = 0.3
    pictures: str | None = None
    device: str = "cpu"
    out: str | None = None

    def __post_init__(self) -> None:
        _check_top(self.top)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says about one image.

    Attributes:
        file: the image.
        classes: names and probabilities of the likeliest classes, the likeliest first; empty if there is an error.
        error: why the image could not be read; None: it could.
        objects: what a detector found, the surest first; None: the network is none.
    """

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    objects: tuple[FoundObject, ...] | None = None


def predict_checkpoint(config: PredictConfig) -> list[Prediction]:
    """The predictions for the images, in their order; also written to `config.out`.

    Raises:
        ValueError: a checkpoint that cannot be used, or a folder without images; an unreadable image is told in its place.
    """
    trained = load_trained(config.checkpoint, config.device)
    pictures = None if config.pictures is None else Path(config.pictures)
    if trained.config.task == "detect":
        files = image_files(config.images)
        objects_found = find_objects(
            trained, files, threshold=config.threshold, pictures=pictures, device=config.device
        )
        predictions = [Prediction(file=file, objects=objects, error=error) for file, objects, error in objects_found]
    elif trained.config.task == "video":
        predictions = [
            Prediction(file=file, error=found) if isinstance(found, str) else Prediction(file=file, classes=found)
            for file, found in predict_clips(
                trained, clip_paths(config.images), top=config.top, device=config.device, pictures=pictures
            )
        ]
    elif pictures is not None:
        raise ValueError(
            f"pictures are drawn of objects and of clips; {config.checkpoint} tells classes: leave --pictures out"
        )
    else:
        files = image_files(config.images)
        predictions = list(predict_images(trained, files, top=config.top, device=config.device))
    if config.out is not None:
        write_text(Path(config.out), "".join(f"{json.dumps(_plain(prediction))}\n" for prediction in predictions))
    return predictions


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files in order, each folder replaced by the images directly in it, sorted by name.

    Raises:
        ValueError: a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if _is_image(file))
        if not found:
            raise ValueError(
                f"{path}: no image directly in this folder (looked for {' '.join(IMG_EXTENSIONS)}); name the files, or "
                "the folders that hold them"
            )
        files += found
    return files


@torch.no_grad()
def predict_images(
    trained: Trained, paths: Iterable[str | Path], *, top: int = 3, device: str = "cpu"
) -> Iterator[Prediction]:
    """The likeliest classes of each image, in order, prepared as the run's evaluation does.

    Args:
        trained: whose model, on `device` and in evaluation mode.
        paths: image files; read some at a time, while their predictions are taken.
        top: how many classes.
        device: where the images go.

    Raises:
        ValueError: `top` is not 1 or more. An image that cannot be read gets a prediction with an `error`.
    """
    _check_top(top)
    remaining = iter(paths)
    with standardized(trained.model):
        while chunk := list(islice(remaining, _IMAGES_PER_FORWARD)):
            squares: list[Tensor | str] = [_square(path, trained) for path in chunk]
            readable = [square for square in squares if isinstance(square, Tensor)]
            found = iter(_likeliest(trained, torch.stack(readable), top, device) if readable else ())
            for path, square in zip(chunk, squares, strict=True):
                if isinstance(square, str):
                    yield Prediction(file=str(path), error=square)
                else:
                    yield Prediction(file=str(path), classes=next(found))


def prediction_table(predictions: Sequence[Prediction]) -> "Table":
    """File, class and probability, a line for each class, for the terminal; of a detector the boxes too."""
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "class")
    detects = any(prediction.objects is not None for prediction in predictions)
    table.add_column("score" if detects else "probability", justify="right")
    if detects:
        table.add_column("left, top, right, bottom", justify="right")
    for prediction in predictions:
        if prediction.error is not None:
            table.add_row(Text(prediction.file), Text(prediction.error, style="red"), "")
        for rank, (name, probability) in enumerate(prediction.classes):  # Text: square brackets are no markup
            table.add_row(Text("" if rank else prediction.file), Text(name), f"{100 * probability:.1f} %")
        for rank, item in enumerate(prediction.objects or ()):
            box = ", ".join(f"{value:.0f}" for value in item.box)
            table.add_row(Text("" if rank else prediction.file), Text(item.name), f"{item.score:.2f}", box)
        if prediction.error is None and prediction.objects == ():
            table.add_row(Text(prediction.file), "nothing", "")
    return table


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top must be 1 or more classes, got {top}")


def _is_image(file: Path) -> bool:
    return file.is_file() and file.name.lower().endswith(IMG_EXTENSIONS) and not file.name.startswith(".")


def _square(path: str | Path, trained: Trained) -> Tensor | str:
    try:
        return as_evaluated(read_image(path), trained)
    except ValueError as error:
        return str(error)


def _likeliest(trained: Trained, squares: Tensor, top: int, device: str) -> Iterator[tuple[tuple[str, float], ...]]:
    scores = trained.model(network_input(squares, trained).to(device)).float()
    best = scores.softmax(1).topk(min(top, len(trained.classes)), dim=1)
    for probabilities, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield tuple((trained.classes[label], share) for label, share in zip(labels, probabilities, strict=True))


def _plain(prediction: Prediction) -> dict[str, object]:
    if prediction.error is not None:
        return {"file": prediction.file, "error": prediction.error}
    if prediction.objects is not None:
        objects = [{"class": item.name, "score": item.score, "box": list(item.box)} for item in prediction.objects]
        return {"file": prediction.file, "objects": objects}
    classes = [{"class": name, "probability": share} for name, share in prediction.classes]
    return {"file": prediction.file, "predictions": classes}
