"""FedBN's Digits-Five pickles, read without running what is written in them."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from batchless.data import open_domains

GENERATOR = np.random.default_rng(0)
ARRAYS = {
    "MNIST": GENERATOR.integers(0, 256, (25, 28, 28), dtype=np.uint8),
    "SVHN": GENERATOR.integers(0, 256, (25, 32, 32, 3), dtype=np.uint8),
}
LABELS = np.arange(25) % 10


def write(path: Path, images: object, labels: object, protocol: int = pickle.HIGHEST_PROTOCOL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps((images, labels), protocol))


@pytest.fixture(params=[2, 4, 5], ids="protocol {}".format)
def root(request, tmp_path) -> Path:
    for name, images in ARRAYS.items():
        for part in range(2):
            chosen = slice(10 * part, 10 * part + 10)
            path = tmp_path / name / "partitions" / f"train_part{part}.pkl"
            write(path, images[chosen], LABELS[chosen], request.param)
        write(tmp_path / name / "test.pkl", images[20:], LABELS[20:], request.param)
    return tmp_path


def test_the_parts_follow_each_other_and_the_rest_is_for_the_test(root):
    train, test = open_domains(root, "train"), open_domains(root, "test")
    assert list(train) == ["MNIST", "SVHN"]
    for split, images, chosen in (("train", train, slice(0, 20)), ("test", test, slice(20, 25))):
        assert [images["SVHN"].label(i) for i in range(len(images["SVHN"]))] == LABELS[chosen].tolist(), split
        for index, expected in enumerate(ARRAYS["SVHN"][chosen]):
            assert torch.equal(images["SVHN"].image(index), torch.from_numpy(expected).permute(2, 0, 1))
        for index, expected in enumerate(ARRAYS["MNIST"][chosen]):
            assert torch.equal(images["MNIST"].image(index), torch.from_numpy(expected).expand(3, -1, -1))
    assert train["MNIST"].source(13) == f"{root}/MNIST/partitions/train_part1.pkl image 3"
    assert train["MNIST"].classes == tuple("0123456789")


def test_more_than_ten_parts_are_in_the_order_of_their_numbers(root):
    for part in range(2, 12):
        write(root / "MNIST" / "partitions" / f"train_part{part}.pkl", ARRAYS["MNIST"][:1], np.array([part % 10]))
    images = open_domains(root, "train", domains=["MNIST"])["MNIST"]
    assert [images.label(i) for i in range(20, 30)] == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_without_parts_the_whole_training_list_is_read(root):
    for name, images in ARRAYS.items():
        for path in (root / name / "partitions").iterdir():
            path.unlink()
        write(root / name / "train.pkl", images[:20], LABELS[:20].astype(np.int32).reshape(-1, 1))
    assert {name: len(images) for name, images in open_domains(root, "train").items()} == {"MNIST": 20, "SVHN": 20}


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_and_does_nothing(root, tmp_path):
    write(root / "SVHN" / "test.pkl", ARRAYS["SVHN"], Hostile(tmp_path / "harm"))
    with pytest.raises(ValueError, match=r"SVHN/test.pkl: not a pickle of Digits-Five \(.*mkdir") as error:
        open_domains(root, "test")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()


GREY = ARRAYS["MNIST"][:3]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GREY, LABELS[:2], "3 images but 2 labels"),
        (GREY, np.array([1, 2, 10]), "label 10 of image 2 is out of range"),
        (GREY, np.array([1, 2, -1]), "label -1 of image 2 is out of range"),
        (GREY.reshape(3, -1), LABELS[:3], r"images is uint8 \[3, 784\], expected uint8"),
        (GREY.astype(np.int64), LABELS[:3], r"images is int64 \[3, 28, 28\]"),
        (GREY[:0], LABELS[:0], r"images is uint8 \[0, 28, 28\]"),
        (GREY.astype(np.float32), LABELS[:3], "an array of type 'f4'"),
        (GREY, [1, 2, 3], "expected a pair of arrays"),
        (None, None, "expected a pair of arrays"),
    ],
)
def test_a_pickle_of_something_else_is_named(root, images, labels, message):
    write(root / "MNIST" / "test.pkl", images, labels)
    with pytest.raises(ValueError, match=f"MNIST/test.pkl.*{message}") as error:
        open_domains(root, "test")
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files_are_named(root):
    whole = (root / "MNIST" / "test.pkl").read_bytes()
    for content in (whole[:100], b"", b"\x80\x05N."):
        (root / "MNIST" / "test.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"MNIST/test.pkl: "):
            open_domains(root, "test")
    (root / "MNIST" / "test.pkl").unlink()
    with pytest.raises(ValueError, match=r"MNIST/test.pkl: no such file; unpack"):
        open_domains(root, "test")
    (root / "MNIST" / "partitions" / "train_part0.pkl").unlink()
    with pytest.raises(ValueError, match=r"train_part0.pkl: no such file, but there are 1 parts"):
        open_domains(root, "train")


def test_parts_of_different_shapes_are_refused(root):
    write(root / "MNIST" / "partitions" / "train_part1.pkl", ARRAYS["SVHN"][:3], LABELS[:3])
    with pytest.raises(ValueError, match=r"MNIST: images of different shapes \[\[1, 28, 28\], \[3, 32, 32\]\]"):
        open_domains(root, "train")
