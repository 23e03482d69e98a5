"""CIFAR-10 and CIFAR-100 in the python version: folders of pickles, read without trusting them."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from batchless.data.memory import TensorImages, checked_labels
from batchless.data.pickles import PickledArray, as_text, restricted_load

FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
_FIX = "unpack the original archive (the python version) again"
_CIFAR10_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_CIFAR100_FILES = {"train": ["train"], "test": ["test"]}
_PIXELS = 3 * 32 * 32


def find_cifar(root: Path) -> Path | None:
    """The folder of CIFAR pickles: `root` itself or the one in it, else None; ValueError if `root` holds both sets."""
    if (root / "data_batch_1").is_file() or _is_cifar100(root) or root.name in FOLDERS:
        return root
    found = [root / name for name in FOLDERS if (root / name).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{root} holds CIFAR-10 and CIFAR-100; name one of them: {found[0]} or {found[1]}")
    return found[0] if found else None


def open_cifar(root: Path, split: Literal["train", "test"]) -> TensorImages:
    """The images of a `cifar-10-batches-py` or `cifar-100-python` folder; CIFAR-100 with its 100 fine classes.

    The pickles are read by `read_pickle`, which runs nothing that is written in them. ValueError naming the file (and the
    image) if one is missing, damaged, refused, or if images and labels don't agree.
    """
    fine = _is_cifar100(root) or root.name == FOLDERS[1]
    labels_key, names_key, meta_name = (
        ("fine_labels", "fine_label_names", "meta") if fine else ("labels", "label_names", "batches.meta")
    )
    classes = _names(root / meta_name, names_key)
    files = _CIFAR100_FILES[split] if fine else _CIFAR10_FILES[split]
    parts = [_read_batch(root / name, labels_key, classes=len(classes)) for name in files]
    return TensorImages(
        images=torch.from_numpy(np.concatenate([images for images, _ in parts])),
        labels=tuple(label for _, labels in parts for label in labels),
        classes=classes,
        origins=tuple((f"{root / name} image", len(labels)) for name, (_, labels) in zip(files, parts, strict=True)),
    )


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary of builtin values and integer arrays; its keys as str, whichever Python wrote it.

    Nothing from outside this file is ever imported or called for a pickle: array reconstruction is replaced by checks
    and `numpy.frombuffer`, and any other name in it is refused. ValueError naming the file otherwise.
    """
    try:
        content = restricted_load(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; {_FIX}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path}: not a CIFAR pickle ({' '.join(str(error).split())}); {_FIX}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__} where CIFAR has a dictionary; {_FIX}")
    return {as_text(key): value.values if isinstance(value, PickledArray) else value for key, value in content.items()}


def _is_cifar100(root: Path) -> bool:
    return (root / "meta").is_file() and (root / "train").is_file()


def _names(path: Path, key: str) -> tuple[str, ...]:
    """The class names in the file that goes with the batches."""
    meta = read_pickle(path)
    names = meta.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str | bytes) for name in names):
        raise ValueError(f"{path}: no list of class names under {key!r}, there is {sorted(meta)}; {_FIX}")
    return tuple(as_text(name) for name in names)


def _read_batch(path: Path, key: str, *, classes: int) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Images uint8 `[n, 3, 32, 32]` and labels of one file."""
    batch = read_pickle(path)
    missing = {"data", key} - set(batch)
    if missing:
        raise ValueError(f"{path}: no {' and '.join(sorted(missing))}, there is {sorted(batch)}; {_FIX}")
    images, labels = batch["data"], batch[key]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
        what = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{path}: data is {what}, CIFAR has uint8 [n, {_PIXELS}]; {_FIX}")
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(labels, list) or len(labels) != len(images):
        what = f"{len(labels)} labels" if isinstance(labels, list) else f"labels of type {type(labels).__name__}"
        raise ValueError(f"{path}: {len(images)} images but {what}; {_FIX}")
    if not labels:
        raise ValueError(f"{path}: no images; {_FIX}")
    for index, label in enumerate(labels):
        if type(label) is not int:
            raise ValueError(f"{path}: label {label!r} of image {index} is no integer; {_FIX}")
    return images.reshape(-1, 3, 32, 32), checked_labels(labels, classes, path=path)
