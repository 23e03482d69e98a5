"""The same images with objects, written as COCO's JSON and as Pascal VOC's XML."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")
Box = tuple[str, int, int, int, int]
"""A class, and the first and last pixel of the object: left, top, right, bottom, counted from 0."""

OBJECTS: tuple[tuple[Box, ...], ...] = (
    (("cat", 2, 3, 10, 12), ("owl", 0, 0, 23, 19)),
    (("dog", 5, 5, 5, 5),),
    (),
    (("owl", 1, 2, 3, 4), ("owl", 8, 8, 20, 15), ("cat", 0, 10, 6, 19)),
)
WIDTH, HEIGHT = 24, 20


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = [f"{index:03}.jpg" for index in range(count)]
    for name in names:
        Image.fromarray(random.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / name)
    return names


def coco_content(names: Sequence[str], objects: Sequence[Sequence[Box]] = OBJECTS) -> dict:
    """Category ids have gaps, as COCO's: 10, 20, 30."""
    annotations = []
    for image, boxes in enumerate(objects):
        for name, left, top, right, bottom in boxes:
            width, height = right - left + 1, bottom - top + 1
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + image,
                    "category_id": 10 * (CLASSES.index(name) + 1),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [corners],
                }
            )
    images = [{"id": 100 + i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(names)]
    categories = [{"id": 10 * (label + 1), "name": name} for label, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, *, splits: Sequence[str] = ("train2017", "val2017"), change=lambda content: None) -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in splits:
        content = coco_content(write_images(root / split, len(OBJECTS)))
        change(content)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def voc_xml(name: str, boxes: Sequence[Box]) -> str:
    objects = "".join(
        f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
        f"<xmax>{right + 1}</xmax><ymax>{bottom + 1}</ymax></bndbox></object>"
        for label, left, top, right, bottom in boxes
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def write_voc(root: Path) -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = write_images(root / "JPEGImages", len(OBJECTS))
    for name, boxes in zip(names, OBJECTS, strict=True):
        (root / "Annotations" / name).with_suffix(".xml").write_text(voc_xml(name, boxes))
    for split in ("train", "val"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(Path(name).stem for name in names) + "\n")
    return root
