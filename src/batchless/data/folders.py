"""Image folder trees: `<split>/<class>/*.jpg` and the like, decoded when an image is asked for."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

TEST_NAMES = ("test", "val", "valid")
# What the accepted extensions stand for, and what is often found behind them. Other formats of PIL start other programs.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""


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


def existing_folder(root: str | Path, *, holding: Sequence[str]) -> Path:
    """The folder `root`, which may begin with `~`; ValueError with what it could hold if there is no such folder."""
    root = Path(root).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}; name a folder that holds {'; or '.join(holding)}")
    return root


def held_out_folder(root: Path) -> Path | None:
    """The folder with the test images: the first of `test/`, `val/`, `valid/` that holds folders, else the first there is.

    ImageNet's `test/` often lies there too, flat and without labels.
    """
    present = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    return next((folder for folder in present if subfolders(folder)), present[0] if present else None)


def open_folders(root: Path, split: Literal["train", "test"]) -> FolderImages:
    """The images of `root/train/<class>/` or of `root/test/<class>/` (else `val/`, `valid/`), classes sorted by name.

    Files with the usual image extensions are taken, in subfolders too; names that begin with a dot are ignored. No image is
    opened. ValueError naming the folder if there are no classes, if the splits have different ones, or if one has no image.
    """
    folder, classes = split_folders(root, split)
    return class_folders(folder, classes, instead="remove the folder from both splits")


def class_folders(folder: Path, classes: tuple[str, ...], *, instead: str) -> FolderImages:
    """The images in a folder for each of `classes`.

    ValueError naming a class folder that cannot be listed or has no image: add some, or do what `instead` says.
    """
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        try:
            found = image_files(folder / name)
        except OSError as error:  # no permission, or a link that leads back to its own folder
            raise ValueError(
                f"{error.filename}: cannot be listed ({error.strerror}); correct or remove this folder"
            ) from error
        if not found:
            raise ValueError(
                f"{folder / name}: no image in this class folder (looked for {' '.join(IMG_EXTENSIONS)});"
                f" add images, or {instead}"
            )
        files.extend((path, label) for path in found)
    return FolderImages(files=tuple(files), classes=classes)


def split_folders(root: Path, split: Literal["train", "test"]) -> tuple[Path, tuple[str, ...]]:
    """The folder of a split, and the names of its class folders, sorted; ValueError if the splits have different ones."""
    train, test = root / "train", held_out_folder(root)
    assert test is not None
    classes = _class_names(train)
    _check_same_classes(train, classes, test, _class_names(test))
    return train if split == "train" else test, classes


def read_image(path: str | Path) -> Tensor:
    """The image in a file as uint8 RGB `[3, H, W]`, turned as its EXIF orientation says; transparency is dropped.

    ValueError naming the file if it is missing, damaged, truncated, or so large that PIL takes it for an attack.
    """
    try:
        with warnings.catch_warnings():
            # Of corrupt EXIF data, as in some of ImageNet: the pixels are fine.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as file:
                pixels = np.array(_rgb(_upright(file)))
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({reason}); replace or remove this file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says.

    `ImageOps.exif_transpose` also writes the EXIF data back, and fails where they are damaged and the pixels are fine.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # PIL's reader of EXIF raises nearly anything
        orientation = None
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL would cut at 255, which makes them white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, 32 bits each, where 8 or 16 are possible")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def image_files(folder: str | Path) -> list[str]:
    """Paths of the images in a folder, sorted, then those in its subfolders; a million of them takes seconds."""
    files, below = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below.append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                files.append(entry.path)
    return sorted(files) + [path for subfolder in sorted(below) for path in image_files(subfolder)]


def _class_names(folder: Path) -> tuple[str, ...]:
    names = subfolders(folder)
    if not names:
        raise ValueError(f"{folder}: no class folders in it; put the files of each class into {folder}/<class>/")
    return names


def subfolders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted; names that begin with a dot are ignored."""
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()))


def _check_same_classes(train: Path, classes: tuple[str, ...], test: Path, others: tuple[str, ...]) -> None:
    for name in sorted(set(classes) ^ set(others)):
        present, absent = (train, test) if name in classes else (test, train)
        raise ValueError(
            f"{present / name}: there is no class folder {absent / name}; both splits need the same classes"
            f" ({len(classes)} in {train.name}, {len(others)} in {test.name})"
        )
