"""FedBN's Digits-Five: a folder of pickles for each of MNIST, SVHN, USPS, SynthDigits and MNIST-M, read without trust.

`<domain>/partitions/train_part0.pkl` to `..._part9.pkl` (743 or 744 images each, in this order one list of 7438) or, where
these are missing, `<domain>/train.pkl`; and `<domain>/test.pkl`. Each holds a pair (images, labels) of integer arrays.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from batchless.data.domain_split import DomainImages
from batchless.data.memory import TensorImages, checked_labels
from batchless.data.pickles import PickledArray, restricted_load

CLASSES = tuple("0123456789")
_FIX = "unpack FedBN's archive of Digits-Five again"


def find_digits_five(root: Path) -> tuple[str, ...]:
    """The names of the folders in `root` with `test.pkl`, `train.pkl` or `partitions/`, sorted."""
    return tuple(
        sorted(
            {path.parent.name for name in ("test.pkl", "train.pkl", "partitions") for path in root.glob(f"*/{name}")}
        )
    )


def open_digits_five(folder: Path, split: Literal["train", "test"]) -> DomainImages:
    """The images of one domain's split: grey `[N, H, W]` or colour `[N, H, W, 3]` on disk, in the order of the pickles.

    ValueError naming the file if one is missing, damaged, refused, or if images and labels don't agree.
    """
    files = _training_files(folder) if split == "train" else [folder / "test.pkl"]
    parts = [_read(path) for path in files]
    shapes = {part[0].shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"{folder}: images of different shapes {sorted(map(list, shapes))} in its parts; {_FIX}")
    images = TensorImages(
        images=torch.cat([part for part, _ in parts]),
        labels=tuple(label for _, labels in parts for label in labels),
        classes=CLASSES,
        origins=tuple((f"{path} image", len(labels)) for path, (_, labels) in zip(files, parts, strict=True)),
    )
    return DomainImages(images=images, is_split=True)


def images_from_array(array: NDArray[Any], *, what: str, fix: str) -> torch.Tensor:
    """uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]` as uint8 `[N, 1 or 3, H, W]`; ValueError for anything else."""
    grey = array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 1)
    if array.dtype != np.uint8 or array.size == 0 or not (grey or (array.ndim == 4 and array.shape[3] == 3)):
        raise ValueError(
            f"{what} is {array.dtype} {list(array.shape)}, expected uint8 [n, height, width] or"
            f" [n, height, width, 3]; {fix}"
        )
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images.reshape(len(array), 1, *array.shape[1:3]) if grey else images.permute(0, 3, 1, 2).contiguous()


def _training_files(folder: Path) -> list[Path]:
    """The parts in the order of their numbers, which must run from 0; without parts `train.pkl`."""
    parts = list((folder / "partitions").glob("train_part*.pkl"))
    if not parts:
        return [folder / "train.pkl"]
    expected = [folder / "partitions" / f"train_part{number}.pkl" for number in range(len(parts))]
    for path in expected:
        if path not in parts:
            raise ValueError(f"{path}: no such file, but there are {len(parts)} parts; {_FIX}")
    return expected


def _read(path: Path) -> tuple[torch.Tensor, tuple[int, ...]]:
    try:
        content = restricted_load(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; {_FIX}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path}: not a pickle of Digits-Five ({' '.join(str(error).split())}); {_FIX}") from error
    if (
        not isinstance(content, tuple | list)
        or len(content) != 2
        or not all(type(part) is PickledArray for part in content)
    ):
        raise ValueError(f"{path}: expected a pair of arrays, images and labels; {_FIX}")
    arrays = [getattr(part, "values", None) for part in content]
    if arrays[0] is None or arrays[1] is None:
        raise ValueError(f"{path}: an array without values; {_FIX}")
    images = images_from_array(arrays[0], what=f"{path}: images", fix=_FIX)
    labels = arrays[1].reshape(-1).tolist()
    if len(labels) != len(images):
        raise ValueError(f"{path}: {len(images)} images but {len(labels)} labels; {_FIX}")
    return images, checked_labels(labels, len(CLASSES), path=path)
