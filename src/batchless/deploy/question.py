"""What a trained network is asked about images of the user's, and what it answers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What `batchless predict` looks at.

    Attributes:
        checkpoint: of a run.
        images: files, and folders of which all images directly in them are taken; of a run on clips, video files, folders of
            frames, and folders of video files.
        top: how many classes are told for each image; of a segmenter the largest.
        threshold: of a detector: the smallest score of an object that is told.
        pictures: folder for pictures: of a detector, the images with what was found; of a segmenter, label maps; of a run on
            clips, a strip of frames of each; None: none.
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
        require_top(self.top)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class FoundObject:
    """An object in an image.

    Attributes:
        name: of its class.
        score: of the detection, 0 to 1.
        box: left, top, right, bottom in pixels.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says about one image.

    Attributes:
        file: the image.
        classes: names and probabilities of the likeliest classes, the likeliest first; empty if there is an error.
        error: why the image could not be read; None: it could.
        objects: what a detector found, the surest first; None: the network is none.
        areas: of a segmenter: names of classes and their share of the pixels, the largest first; None: the network is none.
    """

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    objects: tuple[FoundObject, ...] | None = None
    areas: tuple[tuple[str, float], ...] | None = None


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


def require_top(top: int) -> None:
    """Raise ValueError if no class is asked for."""
    if top < 1:
        raise ValueError(f"top must be 1 or more classes, got {top}")


def _is_image(file: Path) -> bool:
    return file.is_file() and file.name.lower().endswith(IMG_EXTENSIONS) and not file.name.startswith(".")
