"""FLamby's Fed-ISIC2019: skin lesions of eight classes from six centres, listed in a CSV file."""

import csv
from pathlib import Path
from typing import Literal

from batchless.data.domain_lists import check_present
from batchless.data.domain_split import DomainImages
from batchless.data.folders import FolderImages

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
_LISTS = ("train_test_split", "train_test_split.csv", "train_test_folds.csv")
_IMAGE_FOLDERS = ("ISIC_2019_Training_Input_preprocessed", "ISIC_2019_Training_Input")
_COLUMNS = ("image", "target", "center", "fold")


def find_fed_isic2019(root: Path) -> Path | None:
    """FLamby's list in `root`: `train_test_split`, with or without `.csv`; or `train_test_folds.csv`, as it once was."""
    return next((root / name for name in _LISTS if (root / name).is_file()), None)


def fed_isic2019_domains(path: Path) -> tuple[str, ...]:
    """`center_0` and so on, those that the list names."""
    return tuple(f"center_{number}" for number in sorted({row["center"] for row in _rows(path)}, key=int))


def open_fed_isic2019(path: Path, domain: str, split: Literal["train", "test"]) -> DomainImages:
    """The images of a centre in FLamby's own split, in the order of the list; the images lie beside it.

    ValueError naming list and line for a row that is not FLamby's, or the image that is missing.
    """
    folder = next((path.parent / name for name in _IMAGE_FOLDERS if (path.parent / name).is_dir()), None)
    if folder is None:
        raise ValueError(
            f"{path.parent}: no folder {' or '.join(_IMAGE_FOLDERS)} beside {path.name}; put the images there"
        )
    center = domain.removeprefix("center_")
    rows = [row for row in _rows(path) if row["center"] == center and row["fold"] == split]
    if not rows:
        raise ValueError(f"{path}: no {split} image of center {center}; take FLamby's list again")
    files = tuple((str(folder / f"{row['image']}.jpg"), int(row["target"])) for row in rows)
    check_present([name for name, _ in files], listed_in=path)
    return DomainImages(images=FolderImages(files=files, classes=CLASSES), is_split=True)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"no column {missing[0]!r}, there are {', '.join(reader.fieldnames or ('none',))}")
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not FLamby's list of Fed-ISIC2019 ({error}); take it again") from error
    for number, row in enumerate(rows, start=2):
        known = row["fold"] in ("train", "test") and (row["center"] or "").isdecimal()
        if not known or row["target"] not in map(str, range(len(CLASSES))) or not _is_plain(row["image"]):
            shown = {name: row[name] for name in _COLUMNS}
            raise ValueError(f"{path} line {number}: {shown}, expected an image's name, target 0 to 7, center and fold")
    return rows


def _is_plain(name: str | None) -> bool:
    """Whether it is a file's name, not a path that leads elsewhere."""
    return bool(name) and Path(str(name)).name == name
