"""COCO's layout: images in a folder for each split, and one JSON file of their objects (cocodataset.org, "data format")."""

import json
import os
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from batchless.data.folders import read_image
from batchless.data.objects import AnnotatedImage, DetectionImages, ObjectCollector

_PREFIX = "instances_"
_TEST_SHARE = 4
"""Of a single file of annotations, every so many-th part is for test."""


def coco_files(root: Path) -> list[Path]:
    """The files `annotations/instances_<split>.json` in `root`, sorted."""
    return sorted((root / "annotations").glob(f"{_PREFIX}*.json"))


def open_coco(root: Path, split: Literal["train", "test"]) -> DetectionImages:
    """The images of a split of COCO's layout: `annotations/instances_<split>.json` and the images in `<split>/`.

    Training takes the file whose split begins with `train`, test the one that begins with `val`, else `test`. Where there is
    one file only, the last quarter of its images is for test and the others for training. Classes are the file's categories
    by rising id, so that COCO's 80 classes with their ids from 1 to 90 get labels from 0 to 79.

    Raises:
        ValueError: naming the file: it is damaged, lacks something, or images that it names are not there.
    """
    files = coco_files(root)
    if len(files) == 1:
        images = read_coco(files[0], root / _split_of(files[0]))
        begin = len(images) - len(images) // _TEST_SHARE
        chosen = images.images[:begin] if split == "train" else images.images[begin:]
        what = f"images of {files[0].name} are for {split}: it is the only file"
        return DetectionImages(images=chosen, classes=images.classes, found={**images.found, what: len(chosen)})
    for prefix in ("train",) if split == "train" else ("val", "test"):
        found = [file for file in files if _split_of(file).startswith(prefix)]
        if len(found) == 1:
            return read_coco(found[0], root / _split_of(found[0]))
        if found:
            raise ValueError(
                f"{root / 'annotations'} has several files for {split} ({', '.join(f.name for f in found)})"
            )
    raise ValueError(f"{root / 'annotations'} has no file {_PREFIX}{'train' if split == 'train' else 'val'}<year>.json")


def read_coco(annotations: Path, folder: Path) -> DetectionImages:
    """The images that an annotation file names, which lie in `folder`.

    Raises:
        ValueError: naming the file, if it is no such JSON file or images are missing.
    """
    content = _content(annotations)
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in sorted(content["categories"], key=lambda e: e["id"])}
        objects = defaultdict(list)
        for entry in content["annotations"]:
            objects[entry["image_id"]].append(entry)
        files = [str(entry["file_name"]) for entry in content["images"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{annotations}: an entry lacks something or has another type ({error!r})") from error
    if len(set(names.values())) < len(names):
        raise ValueError(f"{annotations}: two categories have the same name")
    _check_there(files, folder, annotations)
    found: Counter[str] = Counter()
    known = {entry["id"] for entry in content["images"]}
    found["objects of an image that is not listed, left out"] = sum(
        len(entries) for image, entries in objects.items() if image not in known
    )
    images = tuple(
        _image(entry, objects[entry["id"]], names, folder, annotations, found) for entry in content["images"]
    )
    if not images:
        raise ValueError(f"{annotations}: it names no image")
    return DetectionImages(images=images, classes=tuple(names.values()), found=found)


def _split_of(file: Path) -> str:
    return file.stem.removeprefix(_PREFIX)


def _content(annotations: Path) -> dict[str, Any]:
    try:
        content = json.loads(annotations.read_bytes())
    except OSError as error:
        raise ValueError(f"{annotations}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{annotations}: not JSON ({error}); replace it by an undamaged copy") from error
    if not isinstance(content, dict):
        raise ValueError(f"{annotations}: a {type(content).__name__}: expected COCO's instances_*.json")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{annotations}: no list {key!r} in it: expected COCO's instances_*.json")
    return content


def _check_there(files: list[str], folder: Path, annotations: Path) -> None:
    """Look for all files at once: one listing of the folder, not a question for each of a hundred thousand images."""
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder}: the images of {annotations} are not there ({error.strerror})") from error
    missing = [file for file in files if file not in there and not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder / missing[0]} and {len(missing) - 1} more of the {len(files)} images that {annotations} names are not "
            "there: put them there, or remove them from the file"
        )


def _image(
    entry: dict[str, Any],
    objects: list[dict[str, Any]],
    names: dict[int, str],
    folder: Path,
    annotations: Path,
    found: Counter[str],
) -> AnnotatedImage:
    path = str(folder / entry["file_name"])
    try:
        height, width = int(entry["height"]), int(entry["width"])
        collector = ObjectCollector(height=height, width=width, classes=tuple(names.values()), found=found)
        for item in objects:
            left, top, box_width, box_height = (float(value) for value in item["bbox"])
            collector.add(
                names.get(item["category_id"]),
                (left, top, left + box_width, top + box_height),
                crowd=bool(item.get("iscrowd", 0)),
                area=float(item["area"]) if "area" in item else None,
                segmentation=item.get("segmentation", []),
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{annotations}: an object of {entry['file_name']} is damaged ({error!r})") from error
    return collector.image(path, partial(read_image, path), masks=all(item.get("segmentation") for item in objects))
