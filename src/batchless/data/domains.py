"""Opening a folder of domains, in whichever layout it lies on disk."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from batchless.data.dataset import ImageDataset, open_images
from batchless.data.digit_domains import digit_domains
from batchless.data.digits_five import find_digits_five, open_digits_five
from batchless.data.domain_folders import find_domain_folders, is_one_dataset, open_domain_folder
from batchless.data.domain_lists import find_lists, open_list
from batchless.data.domain_npz import find_npz, open_npz
from batchless.data.domain_split import DomainImages, of_classes, stratified_part
from batchless.data.fed_isic2019 import fed_isic2019_domains, find_fed_isic2019, open_fed_isic2019
from batchless.data.folders import existing_folder

Split = Literal["train", "test"]

DOMAIN_LAYOUTS = (
    "a folder for each domain with a folder for each class (<domain>/<class>/*.jpg), or with train/ and test/ in it",
    "DomainNet's lists (<domain>_train.txt, <domain>_test.txt, here or in splits/) beside the images",
    "FedBN's Digits-Five (<domain>/partitions/train_part0.pkl, <domain>/test.pkl)",
    "NumPy archives (<domain>.npz with train_images, train_labels, test_images, test_labels)",
    "FLamby's Fed-ISIC2019 (train_test_split beside ISIC_2019_Training_Input_preprocessed/)",
    "one data set that `batchless train` reads, as a single domain (CIFAR, MNIST, train/<class>/)",
)


def open_domains(
    root: str | Path | None,
    split: Split,
    *,
    domains: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> dict[str, ImageDataset]:
    """The images of a split of each domain in `root`, whose layout is detected; all domains have the same classes.

    Domains without a split of their own are split as FedBN and FedWon split Office-Caltech-10: scikit-learn's
    StratifiedShuffleSplit on each domain. Its order is random, so the first images of a training list are a fair sample.

    Args:
        root: a folder in one of `DOMAIN_LAYOUTS`; None: the embedded `digit_domains`.
        split: "train" or "test".
        domains: these only, in this order; None: all, sorted by name.
        classes: these only, labelled in this order; None: all. The others are left out before the split.
        test_share: share of each domain's images in the test split, where the data has none of its own.
        seed: of that split; the same for training and test.

    ValueError, with the path and what is possible, if the folder is missing, in no known layout, or in disorder.

    >>> {name: len(images) for name, images in open_domains(None, "train").items()}
    {'plain': 1456, 'photos': 1444, 'street': 1428, 'scanner': 1420, 'fonts': 1436}
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: there are 'train' and 'test'")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share}: give a share of the images, above 0 and below 1")
    where = "the embedded digits" if root is None else str(root)
    openers = _openers(root, split)
    names = tuple(openers) if domains is None else tuple(domains)
    for name in names:
        if name not in openers:
            raise ValueError(f"domain {name!r}: there is none of that name in {where}, there are {', '.join(openers)}")
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"domains={list(names)}: name one or more, each once, of {', '.join(openers)}")
    if classes is not None and (len(set(classes)) != len(classes) or not classes):
        raise ValueError(f"classes={list(classes)}: name one or more, each once")
    opened = {name: openers[name]() for name in names}
    if classes is None:
        _check_same_classes({name: domain.images for name, domain in opened.items()})
    result: dict[str, ImageDataset] = {}
    for name, domain in opened.items():
        images = domain.images if classes is None else of_classes(domain.images, classes, domain=name)
        if not domain.is_split:
            images = stratified_part(images, split, domain=name, test_share=test_share, seed=seed)
        if not len(images):
            raise ValueError(f"domain {name!r} in {where}: no {split} image of the classes {', '.join(images.classes)}")
        result[name] = images
    return result


def _openers(root: str | Path | None, split: Split) -> dict[str, Callable[[], DomainImages]]:
    """How to open each domain there is; nothing is read but lists of names."""
    if root is None:
        embedded = digit_domains(split)
        return {name: partial(DomainImages, images=images, is_split=True) for name, images in embedded.items()}
    root = existing_folder(root, holding=DOMAIN_LAYOUTS)
    if path := find_fed_isic2019(root):
        return {name: partial(open_fed_isic2019, path, name, split) for name in fed_isic2019_domains(path)}
    if names := find_npz(root):
        return {name: partial(open_npz, root / f"{name}.npz", split) for name in names}
    if names := find_lists(root):
        return {name: partial(open_list, root, name, split) for name in names}
    if names := find_digits_five(root):
        return {name: partial(open_digits_five, root / name, split) for name in names}
    if is_one_dataset(root):
        return {root.resolve().name: lambda: DomainImages(images=open_images(root, split), is_split=True)}
    if names := find_domain_folders(root):
        return {name: partial(open_domain_folder, root / name, split) for name in names}
    raise ValueError(f"{root} holds no known layout of domains; possible are {'; or '.join(DOMAIN_LAYOUTS)}")


def _check_same_classes(domains: Mapping[str, ImageDataset]) -> None:
    """ValueError naming the class that a domain has alone or lacks alone, else the first difference."""
    first, *others = domains
    for other in others:
        for name in sorted(set(domains[first].classes) ^ set(domains[other].classes)):
            having = [domain for domain, images in domains.items() if name in images.classes]
            lacking = [domain for domain in domains if domain not in having]
            raise ValueError(
                f"class {name!r} is in {', '.join(map(repr, having[:3]))}{' and others' if len(having) > 3 else ''} but not in"
                f" {', '.join(map(repr, lacking[:3]))}{' and others' if len(lacking) > 3 else ''}: all domains need the same"
                " classes; remove or rename the folder, or choose domains or classes"
            )
        if domains[first].classes != domains[other].classes:
            raise ValueError(
                f"domains {first!r} and {other!r} have the same classes in another order; order them alike"
            )
