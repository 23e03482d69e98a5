"""Image folder trees: `<split>/<class>/*.jpg` and the like, decoded when an image is asked for."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

TEST_NAMES = ("test", "val", "valid")
# What the accepted extensions stand for, and what is often found behind them. Other formats of PIL start other programs.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderImages:
    """Images in files, one (path, label) for each, in the order of their classes and names."""

    files: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """The decoded image as uint8 `[3, H, W]`; ValueError naming the file if it cannot be read."""
        return read_image(self.files[index][0])

    def label(self, index: int) -> int:
        """The index of the image's class in `classes`."""
        return self.files[index][1]

    def source(self, index: int) -> str:
        """The path of the file."""
        return self.files[index][0]


def held_out_folder(root: Path) -> Path | None:
    """The folder with the test images: the first of `test/`, `val/`, `valid/` that is there."""
    return next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)


def open_folders(root: Path, split: Literal["train", "test"]) -> FolderImages:
    """The images of `root/train/<class>/` or of `root/test/<class>/` (else `val/`, `valid/`), classes sorted by name.

    Files with the usual image extensions are taken, in subfolders too; names that begin with a dot are ignored.
    ValueError naming the folder if there are no classes, if the splits have different ones, or if one has no image.
    """
    train, test = root / "train", held_out_folder(root)
    assert test is not None
    classes = _class_names(train)
    _check_same_classes(train, classes, test, _class_names(test))
    folder = train if split == "train" else test
    found = make_dataset(
        folder,
        class_to_idx={name: label for label, name in enumerate(classes)},
        is_valid_file=_is_image,
        allow_empty=True,
    )
    empty = set(range(len(classes))) - {label for _, label in found}
    if empty:
        raise ValueError(
            f"{folder / classes[min(empty)]}: no image in this class folder (looked for {' '.join(IMG_EXTENSIONS)});"
            " add images, or remove the folder from both splits"
        )
    return FolderImages(files=tuple(found), classes=classes)


def read_image(path: str | Path) -> Tensor:
    """The image in a file as uint8 RGB `[3, H, W]`, turned as its EXIF orientation says; transparency is dropped.

    ValueError naming the file if it is missing, damaged, truncated, or so large that PIL takes it for an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as file:
                pixels = np.array(_rgb(ImageOps.exif_transpose(file)))
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({reason}); replace or remove this file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL would cut at 255, which makes them white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, 32 bits each, where 8 or 16 are possible")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _is_image(path: str) -> bool:
    name = Path(path).name.lower()
    return name.endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: no class folders in it; put the images of each class into {folder}/<class>/")
    return tuple(names)


def _check_same_classes(train: Path, classes: tuple[str, ...], test: Path, others: tuple[str, ...]) -> None:
    for name in sorted(set(classes) ^ set(others)):
        present, absent = (train, test) if name in classes else (test, train)
        raise ValueError(
            f"{present / name}: there is no class folder {absent / name}; both splits need the same classes"
            f" ({len(classes)} in {train.name}, {len(others)} in {test.name})"
        )
