"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped."""

import gzip
import zlib
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from batchless.data.memory import TensorImages, checked_labels

CLASSES = tuple("0123456789")
_SPLIT_NAMES = {"train": ("train",), "test": ("t10k", "test")}
_FIX = "replace the file by an undamaged copy"


def holds_idx(root: Path) -> bool:
    """Whether the folder holds IDX image files (`*-images-idx3-ubyte`, or `.gz`)."""
    return any(_matches(root, name, "images-idx3") for names in _SPLIT_NAMES.values() for name in names)


def open_idx(root: Path, split: Literal["train", "test"]) -> TensorImages:
    """The images of `train-...-ubyte[.gz]` or `t10k-...` (also `test-...`) in a folder, with the ten classes "0" to "9".

    Grey images get three equal channels. ValueError naming the file if one is missing, truncated or too long, is not IDX,
    or if images and labels don't agree.
    """
    images_path, labels_path = _find(root, split, "images-idx3"), _find(root, split, "labels-idx1")
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images but {labels_path} holds {len(labels)} labels;"
            " they must come from the same data set"
        )
    return TensorImages(
        images=images[:, None],
        labels=checked_labels(labels.tolist(), len(CLASSES), path=labels_path),
        classes=CLASSES,
        origins=((f"{images_path} image", len(images)),),
    )


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes as a uint8 tensor with that many dimensions.

    The file is: two zero bytes, 8 (unsigned byte), the number of dimensions, each size as a big-endian 32-bit integer,
    then the values in C order. ValueError naming the file if it is anything else.
    """
    header = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(header)
            if len(start) < header or start[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(
                    f"{path}: not an IDX file of bytes in {dimensions} dimensions; it begins with"
                    f" {start[:4].hex(' ') or 'nothing'}, expected 00 00 08 0{dimensions} and the sizes; {_FIX}"
                )
            shape = [int.from_bytes(start[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1)]
            values = file.read(prod(shape) + 1)  # one more, to notice a file that is too long
    except (OSError, EOFError, zlib.error, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error) or type(error).__name__}); {_FIX}") from error
    if len(values) != prod(shape):
        amount = "more" if len(values) > prod(shape) else f"only {len(values)}"
        raise ValueError(f"{path}: the header promises {prod(shape)} values {shape}, the file holds {amount}; {_FIX}")
    if not values:
        raise ValueError(f"{path}: holds nothing, its sizes are {shape}; {_FIX}")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


def _matches(root: Path, name: str, kind: str) -> list[Path]:
    """Files such as `train-images-idx3-ubyte`, with or without a prefix (`emnist-digits-`) and `.gz`, plain ones first."""
    pattern = f"*{name}-{kind}-ubyte"
    return sorted(root.glob(pattern)) or sorted(root.glob(pattern + ".gz"))


def _find(root: Path, split: str, kind: str) -> Path:
    found = [path for name in _SPLIT_NAMES[split] for path in _matches(root, name, kind)]
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(f"{name}-{kind}-ubyte[.gz]" for name in _SPLIT_NAMES[split])
    if not found:
        raise ValueError(f"{root}: no file {wanted}; an IDX data set needs images and labels of both splits")
    raise ValueError(f"{root}: several files {wanted} ({', '.join(path.name for path in found)}); keep one per folder")
