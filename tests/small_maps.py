"""The same images with label maps, written as folders, as Pascal VOC's devkit and with Cityscapes' names."""

from pathlib import Path

import numpy as np
from PIL import Image

from batchless.data.label_classes import CITYSCAPES, voc_colours

HEIGHT, WIDTH = 24, 32
SPLITS = {"train": 8, "test": 4}


def scene(seed: int, *, classes: int = 3, height: int = HEIGHT, width: int = WIDTH):
    """An image whose channels tell the class of each pixel, with a border of ignored ones: uint8 arrays."""
    random = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    for label in range(1, classes):
        top, left = random.integers(0, height - 10), random.integers(0, width - 10)
        labels[top : top + 10, left : left + 10] = label
    colours = np.stack([20 + 60 * labels, 200 - 50 * labels, 90 + 0 * labels], 2).astype(np.uint8)
    image = (colours.astype(int) + random.integers(-9, 10, colours.shape)).clip(0, 255).astype(np.uint8)
    labels[:2] = 255
    return image, labels


def save_map(labels, path: Path, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels)
    if palette:
        picture.putpalette(voc_colours(256).flatten().tolist())
    picture.save(path)


def save_image(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=98)


def write_folders(root: Path, *, train: int = 8, test: int = 4, maps: str = "labels") -> Path:
    """`train/images/*.png`, `train/labels/*.png`, the same of test: seeds are 0, 1, ... and 100, 101, ..."""
    for split, first, count in (("train", 0, train), ("test", 100, test)):
        for seed in range(first, first + count):
            image, labels = scene(seed)
            save_image(image, root / split / "images" / f"{seed:03}.png")
            save_map(labels, root / split / maps / f"{seed:03}.png")
    return root


def write_voc(root: Path, *, aug: bool = False) -> Path:
    folder = root / "VOCdevkit" / "VOC2012"
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, seeds in (("train", range(3)), ("val", range(100, 102)), ("trainaug", range(5) if aug else ())):
        for seed in seeds:
            image, labels = scene(seed)
            save_image(image, folder / "JPEGImages" / f"{seed:03}.jpg")
            if split == "trainaug":
                save_map(labels, folder / "SegmentationClassAug" / f"{seed:03}.png")
            else:
                save_map(labels, folder / "SegmentationClass" / f"{seed:03}.png", palette=True)
        if seeds:
            lines = [
                f"/JPEGImages/{seed:03}.jpg /SegmentationClassAug/{seed:03}.png"
                if split == "trainaug"
                else f"{seed:03}"
                for seed in seeds
            ]
            (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_cityscapes(root: Path, *, train_ids: bool) -> Path:
    ids = np.full(256, 255, np.uint8)
    ids[:3] = [number for number, _ in list(CITYSCAPES.values())[:3]]
    for split, seeds in (("train", range(3)), ("val", range(100, 102))):
        for seed in seeds:
            image, labels = scene(seed)
            save_image(image, root / "leftImg8bit" / split / "ulm" / f"ulm_{seed:03}_leftImg8bit.png")
            kind, stored = ("labelTrainIds", labels) if train_ids else ("labelIds", ids[labels])
            if not train_ids:
                stored = stored.copy()
                stored[2] = 4  # static: an id that is not trained
            save_map(stored, root / "gtFine" / split / "ulm" / f"ulm_{seed:03}_gtFine_{kind}.png")
    return root
