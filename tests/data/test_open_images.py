from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchless.data import Subset, first_images, open_images
from batchless.data.memory import TensorImages


def labelled(labels: list[int]) -> TensorImages:
    return TensorImages(
        images=torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2),
        labels=tuple(labels),
        classes=tuple("abcde"),
        origins=(("list", len(labels)),),
    )


@dataclass
class Layout:
    """Files that make a folder look like a layout, and the word by which its own reader complains about them."""

    files: tuple[str, ...]
    complaint: str


CIFAR = Layout(files=("data_batch_1", "batches.meta"), complaint="CIFAR pickle")
LAYOUTS = {
    "CIFAR-10 folder": CIFAR,
    "folder with CIFAR-10": Layout(files=("cifar-10-batches-py/batches.meta",), complaint="CIFAR pickle"),
    "CIFAR-100 folder": Layout(files=("train", "test", "meta"), complaint="CIFAR pickle"),
    "folder with CIFAR-100": Layout(files=("cifar-100-python/meta",), complaint="CIFAR pickle"),
    "IDX": Layout(files=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), complaint="not an IDX file"),
    "gzipped IDX": Layout(files=("t10k-images-idx3-ubyte.gz",), complaint="no file train-images-idx3-ubyte"),
    "image folders": Layout(files=("train/a/x.png", "val/b/x.png"), complaint="no class folder"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_told_apart(tmp_path, name):
    for file in LAYOUTS[name].files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=LAYOUTS[name].complaint):
        open_images(tmp_path, "train")


def test_none_is_the_embedded_handwriting():
    assert open_images(None, "test").source(0) == "handwriting test 0"


def test_both_cifars_in_one_folder_need_a_choice(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(ValueError, match="holds CIFAR-10 and CIFAR-100; name one"):
        open_images(tmp_path, "train")


@pytest.mark.parametrize("folders", [(), ("train/a",), ("test/a",), ("a", "b")])
def test_an_unknown_layout_lists_the_known_ones(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no known layout") as caught:
        open_images(tmp_path, "train")
    for word in (
        str(tmp_path),
        "cifar-10-batches-py",
        "cifar-100-python",
        "train-images-idx3-ubyte",
        "<class>",
        "valid/",
    ):
        assert word in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; name a folder"):
        open_images(str(tmp_path / "nowhere"), "train")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder"):
        open_images(tmp_path / "file", "train")
    with pytest.raises(ValueError, match=r"split='val': there are 'train' and 'test'"):
        open_images(None, "val")


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 9), data=st.data())
def test_first_images_are_nested_and_hold_every_class(labels, seed, data):
    dataset = labelled(labels)
    least = len(set(labels))
    n = data.draw(st.integers(least, len(labels)))
    part, whole = first_images(dataset, n, seed=seed), first_images(dataset, len(labels), seed=seed)
    assert part.indices == whole.indices[:n]
    assert sorted(whole.indices) == list(range(len(labels)))
    assert {part.label(i) for i in range(n)} == set(labels)


@given(per_class=st.integers(1, 10), rounds=st.integers(1, 10), seed=st.integers(0, 9))
def test_first_images_of_balanced_classes_are_balanced(per_class, rounds, seed):
    part = first_images(labelled([0, 1, 2, 3, 4] * per_class), 5 * min(rounds, per_class), seed=seed)
    assert set(Counter(part.label(i) for i in range(len(part))).values()) == {min(rounds, per_class)}


def test_first_images_keep_proportions():
    part = first_images(labelled([0] * 80 + [1] * 20), 50, seed=3)
    assert abs(Counter(part.label(i) for i in range(50))[1] - 10) <= 1


def test_first_images_depend_on_the_seed():
    dataset = labelled([0, 1] * 50)
    assert first_images(dataset, 20, seed=0).indices == first_images(dataset, 20, seed=0).indices
    assert first_images(dataset, 20, seed=0).indices != first_images(dataset, 20, seed=1).indices


@pytest.mark.parametrize("n", [0, 4, 11])
def test_first_images_out_of_range(n):
    with pytest.raises(ValueError, match=f"n={n} images: the dataset has 10 in 5 classes; give 5 to 10"):
        first_images(labelled([0, 1, 2, 3, 4] * 2), n, seed=0)


def test_a_subset_hands_on_its_images():
    part = Subset(dataset=labelled([3, 1, 4]), indices=(2, 0))
    assert len(part) == 2
    assert [part.label(0), part.label(1)] == [4, 3]
    assert part.image(0).unique().item() == 2
    assert part.source(1) == "list 0"
    assert part.classes == tuple("abcde")
