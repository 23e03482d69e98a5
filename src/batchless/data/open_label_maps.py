"""Opening images with label maps in whichever layout they lie on disk."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from batchless.data.folders import TEST_NAMES, existing_folder, image_files
from batchless.data.label_classes import CITYSCAPES, CITYSCAPES_IDS, VOC_CLASSES
from batchless.data.label_maps import IGNORED, IGNORED_NAME, Colour, LabelMaps, MappedImage, label_table, mapped_files
from batchless.data.scattered_maps import scattered_maps

Split = Literal["train", "test"]

LABEL_MAP_LAYOUTS = (
    "Cityscapes (leftImg8bit/<split>/*/*_leftImg8bit.png, gtFine/<split>/*/*_gtFine_labelIds.png or labelTrainIds.png)",
    "Pascal VOC (JPEGImages/, SegmentationClass/ or SegmentationClassAug/, ImageSets/Segmentation/*.txt, in the folder itself "
    "or up to two below it)",
    "image and map folders (train/images/ and train/labels/, or images/train/ and labels/train/; masks/ or annotations/ for "
    "labels/; test/, val/ or valid/ for test/; classes.txt, with lines `name red green blue` for maps of colours)",
)
_LISTS = Path("ImageSets") / "Segmentation"
_MAP_FOLDERS = ("labels", "masks", "annotations")
_ENDINGS = ("", "_mask", "_L")  # of a map's name, after the image's


def open_label_maps(
    root: str | Path | None, split: Split, *, class_names: Sequence[str] = (), ignore: Sequence[int] = (IGNORED,)
) -> LabelMaps:
    """The images of a split of the data set in `root`, whose layout is detected; None is the embedded sample.

    Args:
        root: the folder.
        split: the images to learn from, or to evaluate on.
        class_names: names of the labels from 0 on; none: the layout's own, of folders those in `classes.txt`, else the
            values in the training maps, each a class.
        ignore: values in the maps that are neither learned nor evaluated.

    Raises:
        ValueError: the folder is missing, in no known layout, or in disorder; with the path and what is possible.
    """
    if root is None:
        _refuse_names(class_names, "the embedded sample")
        return scattered_maps(split)
    root = existing_folder(root, holding=LABEL_MAP_LAYOUTS)
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        _refuse_names(class_names, "Cityscapes")
        return _cityscapes(root, split, ignore)
    if voc := _find_voc(root):
        classes = tuple(class_names or VOC_CLASSES)
        table = label_table(_counted(classes), ignore)
        return LabelMaps(images=_voc(voc, split), classes=classes, table=table, found={})
    if folders := _find_folders(root, split):
        return _folders(root, folders, split, class_names, ignore)
    raise ValueError(f"{root} holds no known layout; possible are {'; or '.join(LABEL_MAP_LAYOUTS)}")


def _refuse_names(class_names: Sequence[str], what: str) -> None:
    if class_names:
        raise ValueError(f"segment.class_names names {len(class_names)} classes and {what} has its own: leave it out")


def _counted(classes: Sequence[str]) -> dict[int, int]:
    if len(classes) > IGNORED:
        raise ValueError(f"{len(classes)} classes: label maps of one byte have at most {IGNORED}")
    return {label: label for label in range(len(classes))}


def _cityscapes(root: Path, split: Split, ignore: Sequence[int]) -> LabelMaps:
    """The test images are those of `val/`: the maps of Cityscapes' own test images are not public."""
    folder = "train" if split == "train" else "val"
    ending = "_leftImg8bit.png"
    images = sorted((root / "leftImg8bit" / folder).glob(f"*/*{ending}"))
    if not images:
        raise ValueError(f"{root / 'leftImg8bit' / folder}: no image <city>/*{ending} in this folder")
    stems = [root / "gtFine" / folder / image.parent.name / image.name.removesuffix(ending) for image in images]
    kind = "labelTrainIds" if Path(f"{stems[0]}_gtFine_labelTrainIds.png").is_file() else "labelIds"
    files = [(image, Path(f"{stem}_gtFine_{kind}.png")) for image, stem in zip(images, stems, strict=True)]
    if kind == "labelTrainIds":
        table = label_table({label: label for label in range(len(CITYSCAPES))}, {*ignore, IGNORED})
    else:
        trained = {number: label for label, (number, _) in enumerate(CITYSCAPES.values())}
        others = {*range(CITYSCAPES_IDS), IGNORED} - trained.keys()
        table = label_table(trained, {*ignore, *others})
    found: Counter[str] = Counter()
    return LabelMaps(images=_with_maps(files, root, found), classes=tuple(CITYSCAPES), table=table, found=found)


def _find_voc(root: Path) -> Path | None:
    candidates = [root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
    parts = ("JPEGImages", _LISTS)
    return next((folder for folder in candidates if all((folder / part).is_dir() for part in parts)), None)


def _voc(folder: Path, split: Split) -> tuple[MappedImage, ...]:
    """Those of `trainaug.txt` (the list with SBD's maps) where it is, else of `train.txt`; of `val.txt` for testing."""
    lists = folder / _LISTS
    name = "val" if split == "test" else "trainaug" if (lists / "trainaug.txt").is_file() else "train"
    listing = lists / f"{name}.txt"
    try:
        # Lists made for DeepLab's code have two paths in a line, the image's and the map's.
        stems = [Path(line.split()[0]).stem for line in listing.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{listing}: the list of images cannot be read ({error})") from error
    if not stems:
        raise ValueError(f"{listing}: the list names no image")
    images = []
    for stem in stems:
        image = folder / "JPEGImages" / f"{stem}.jpg"
        maps = [folder / kind / f"{stem}.png" for kind in ("SegmentationClassAug", "SegmentationClass")]
        label_map = next((path for path in maps if path.is_file()), None)
        if label_map is None:
            raise ValueError(
                f"{listing}: {stem} has a label map neither in SegmentationClassAug/ nor in SegmentationClass/; of "
                "trainaug.txt SBD's maps are needed: put them there, or remove the list to train on train.txt"
            )
        if not image.is_file():
            raise ValueError(f"{listing}: there is no image {image}")
        images.append(mapped_files(image, label_map))
    return tuple(images)


def _find_folders(root: Path, split: Split) -> tuple[Path, Path] | None:
    for name in ("train",) if split == "train" else TEST_NAMES:
        for kind in _MAP_FOLDERS:
            for images, maps in (
                (root / name / "images", root / name / kind),
                (root / "images" / name, root / kind / name),
            ):
                if images.is_dir() and maps.is_dir():
                    return images, maps
    return None


def _folders(
    root: Path, folders: tuple[Path, Path], split: Split, class_names: Sequence[str], ignore: Sequence[int]
) -> LabelMaps:
    found: Counter[str] = Counter()
    listed, palette = _listed(root / "classes.txt")
    if palette is not None:
        _refuse_names(class_names, f"{root / 'classes.txt'}, with a palette,")
        table = label_table(_counted(listed), {IGNORED})
        return LabelMaps(images=_paired(*folders, found, palette), classes=listed, table=table, found=found)
    images = _paired(*folders, found)
    classes = tuple(class_names) or listed
    if classes:
        return LabelMaps(images=images, classes=classes, table=label_table(_counted(classes), ignore), found=found)
    training = images if split == "train" else ()
    if split == "test" and (others := _find_folders(root, "train")):
        training = _paired(*others, Counter())
    if not training:
        raise ValueError(
            f"{root}: there are no training images, whose maps tell the classes: add {root / 'classes.txt'}"
        )
    values = {value for image in training for value in torch.unique(image.read_map()).tolist()} - set(ignore)
    classes = tuple(str(value) for value in sorted(values))
    if not classes:
        raise ValueError(f"{folders[1]}: every pixel of the training maps is ignored: nothing to learn")
    table = label_table({int(name): label for label, name in enumerate(classes)}, ignore)
    return LabelMaps(images=images, classes=classes, table=table, found=found)


def _listed(path: Path) -> tuple[tuple[str, ...], dict[Colour, int] | None]:
    """The names in the order of the labels, and where each line ends in a colour the number of each colour."""
    if not path.is_file():
        return (), None
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    found = [re.fullmatch(r"(\S.*?)\s+(\d+)\s+(\d+)\s+(\d+)", line) for line in lines]
    if not any(found):
        if len(set(lines)) < len(lines):
            raise ValueError(f"{path}: a class is named twice; give one name a line, in the order of the labels")
        return tuple(lines), None
    names: list[str] = []
    palette: dict[Colour, int] = {}
    for line, match in zip(lines, found, strict=True):
        colour = (int(match[2]), int(match[3]), int(match[4])) if match else (IGNORED + 1,) * 3
        if match is None or max(colour) > IGNORED or colour in palette:
            raise ValueError(
                f"{path}: {line!r} has no colour of its own, as other lines have: give `name red green blue` with 0 to "
                f"{IGNORED}, each colour once"
            )
        if match[1] == IGNORED_NAME:
            palette[colour] = IGNORED
        else:  # a class may have several colours
            names += [] if match[1] in names else [match[1]]
            palette[colour] = names.index(match[1])
    return tuple(names), palette


def _paired(
    images: Path, maps: Path, found: Counter[str], palette: dict[Colour, int] | None = None
) -> tuple[MappedImage, ...]:
    by_name: dict[Path, Path] = {}
    for path in map(Path, image_files(maps)):
        by_name[path.relative_to(maps).with_suffix("")] = path
    files = []
    for image in map(Path, image_files(images)):
        stem = image.relative_to(images).with_suffix("")
        names = [stem.with_name(stem.name + ending) for ending in _ENDINGS]
        files.append((image, next((by_name[name] for name in names if name in by_name), maps / f"{stem}.png")))
    found["label maps without an image"] += len(set(by_name.values()) - {path for _, path in files})
    return _with_maps(files, images, found, palette)


def _with_maps(
    files: Sequence[tuple[Path, Path]], folder: Path, found: Counter[str], palette: dict[Colour, int] | None = None
) -> tuple[MappedImage, ...]:
    """Those whose map is there; the others are counted."""
    present = tuple(mapped_files(image, label_map, palette) for image, label_map in files if label_map.is_file())
    found["images without a label map, left out"] += len(files) - len(present)
    if not present:
        example = f", such as {files[0][1]}" if files else ""
        raise ValueError(f"{folder}: none of the {len(files)} images here has a label map{example}")
    return present
