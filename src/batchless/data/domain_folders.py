"""Trees of domains, `root/<domain>/<class>/*.jpg`, or any dataset that `open_images` knows in each domain's folder."""

from pathlib import Path
from typing import Literal

from batchless.data.cifar import find_cifar
from batchless.data.dataset import open_images
from batchless.data.domain_split import DomainImages
from batchless.data.folders import class_folders, held_out_folder, subfolders
from batchless.data.idx import holds_idx


def is_one_dataset(root: Path) -> bool:
    """Whether the folder is a dataset with a split of its own, as `open_images` reads it."""
    return (
        find_cifar(root) is not None or holds_idx(root) or ((root / "train").is_dir() and bool(held_out_folder(root)))
    )


def find_domain_folders(root: Path) -> tuple[str, ...]:
    """The names of the folders in `root` that hold folders, sorted."""
    return tuple(name for name in subfolders(root) if is_one_dataset(root / name) or subfolders(root / name))


def open_domain_folder(folder: Path, split: Literal["train", "test"]) -> DomainImages:
    """The images of one domain: of a split if its folder has one, else all, with a class for each folder in it.

    ValueError naming the class folder if it holds no image.
    """
    if is_one_dataset(folder):
        return DomainImages(images=open_images(folder, split), is_split=True)
    images = class_folders(folder, subfolders(folder), instead="leave the class out of every domain")
    return DomainImages(images=images, is_split=False)
