"""Opening annotated images in whichever layout they lie on disk."""

from pathlib import Path
from typing import Literal

from batchless.data.coco import coco_files, open_coco
from batchless.data.folders import existing_folder
from batchless.data.objects import DetectionImages
from batchless.data.scattered_digits import scattered_digits
from batchless.data.voc import find_voc, open_voc

DETECTION_LAYOUTS = (
    "COCO (annotations/instances_<split>.json and the images in <split>/)",
    "Pascal VOC (Annotations/*.xml, JPEGImages/ and ImageSets/Main/*.txt, in the folder itself or up to two below it)",
)


def open_objects(root: str | Path | None, split: Literal["train", "test"]) -> DetectionImages:
    """The annotated images of a split of the data set in `root`, whose layout is detected; None is the embedded sample.

    Raises:
        ValueError: the folder is missing, in no known layout, or in disorder; with the path and what is possible.
    """
    if root is None:
        return scattered_digits(split)
    root = existing_folder(root, holding=DETECTION_LAYOUTS)
    if coco_files(root):
        return open_coco(root, split)
    if voc := find_voc(root):
        return open_voc(voc, split)
    raise ValueError(f"{root} holds no known layout; possible are {'; or '.join(DETECTION_LAYOUTS)}")
