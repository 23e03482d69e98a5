"""Small datasets in the layouts that people have on disk, with two classes a small network learns: stripes either way."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("lying", "standing")


def stripes(count: int, *, size: int = 8, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Noisy grey images `[count, size, size]` with stripes two pixels wide, lying (0) and standing (1) in turn."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % 2).astype(np.uint8)
    waves = np.where((np.arange(size)[None] + random.integers(4, size=(count, 1))) % 4 < 2, 60.0, 190.0)
    lying = np.repeat(waves[:, :, None], size, axis=2)
    images = np.where(labels[:, None, None] == 0, lying, lying.transpose(0, 2, 1))
    return (images + random.normal(0, 15, images.shape)).clip(0, 255).astype(np.uint8), labels


def write_pictures(root: Path, *, train: int = 16, test: int = 8, size: int = 8) -> Path:
    """An image folder tree: `train/<class>/*.png` and `test/<class>/*.png`."""
    for split, count in (("train", train), ("test", test)):
        for index, (image, label) in enumerate(zip(*stripes(count, size=size, seed=count), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:04}.png")
    return root


def write_idx(root: Path, *, train: int = 16, test: int = 8) -> Path:
    """A folder in MNIST's layout, gzipped."""
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        images, labels = stripes(count, seed=count)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (root / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return root


def write_cifar10(root: Path, *, per_file: int = 4) -> Path:
    """A folder with `cifar-10-batches-py/` in it, 32x32."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        images, labels = stripes(per_file, size=32, seed=seed)
        content = {b"data": np.repeat(images[:, None], 3, axis=1).reshape(per_file, -1), b"labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [name.encode() for name in CLASSES]}, protocol=2)
    )
    return root
