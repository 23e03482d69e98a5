"""A domain in a NumPy archive: `<domain>.npz` with arrays of images and labels, as MedMNIST has them."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchless.data.digits_five import images_from_array
from batchless.data.domain_split import DomainImages
from batchless.data.memory import TensorImages, checked_labels

_FIX = (
    "save it by numpy.savez_compressed(path, train_images=, train_labels=, test_images=, test_labels=, classes=)"
    " with arrays of numbers and names"
)


def find_npz(root: Path) -> tuple[str, ...]:
    """The names of the `.npz` files in `root`, sorted, without the extension."""
    return tuple(sorted(path.stem for path in root.glob("[!.]*.npz")))


def open_npz(path: Path, split: Literal["train", "test"]) -> DomainImages:
    """The images in `train_images` and `train_labels` (or `test_...`), or all of `images` and `labels`; no pickles.

    Images are uint8 `[N, H, W]` or `[N, H, W, 3]`, labels integers `[N]` or `[N, 1]`. `classes` holds the names; without
    it classes are called "0", "1", ... up to the largest label in the archive. ValueError naming file and array for
    anything else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            is_split = "images" not in names
            prefix = f"{split}_" if is_split else ""
            wanted = [f"{prefix}images", f"{prefix}labels"]
            if missing := [name for name in wanted if name not in names]:
                raise ValueError(f"no array {missing[0]!r}, there are {', '.join(sorted(names))}")
            array = archive[wanted[0]]
            every_label = {name: archive[name] for name in sorted(names) if name.endswith("labels")}
            given = archive["classes"] if "classes" in names else None
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason}); {_FIX}") from error
    for name, values in every_label.items():
        if values.dtype.kind not in "iu" or values.size == 0 or values.size != len(values):
            raise ValueError(f"{path}: {name} is {values.dtype} {list(values.shape)}, expected integers [n]; {_FIX}")
    images = images_from_array(array, what=f"{path}: {wanted[0]}", fix=_FIX)
    labels = every_label[wanted[1]].reshape(-1).tolist()
    if len(labels) != len(images):
        raise ValueError(f"{path}: {len(images)} images but {len(labels)} labels; {_FIX}")
    classes = _class_names(given, max(int(values.max()) for values in every_label.values()) + 1, path=path)
    dataset = TensorImages(
        images=images,
        labels=checked_labels(labels, len(classes), path=path),
        classes=classes,
        origins=((f"{path} {wanted[0]}", len(labels)),),
    )
    return DomainImages(images=dataset, is_split=is_split)


def _class_names(given: NDArray[Any] | None, count: int, *, path: Path) -> tuple[str, ...]:
    if given is None:
        return tuple(map(str, range(max(count, 0))))
    if given.dtype.kind != "U" or given.ndim != 1 or len(set(given.tolist())) != len(given):
        raise ValueError(f"{path}: classes is {given.dtype} {list(given.shape)}, expected different names [n]; {_FIX}")
    return tuple(given.tolist())
