import gzip
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchless.data.idx import open_idx, read_idx


def idx_bytes(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_idx(root: Path, *, count: int = 4, name: str = "{}", packed: bool = False) -> Path:
    """A folder in MNIST's layout with random images of 5x7 pixels, label i % 10 for image i."""
    root.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "t10k")):
        images = np.random.default_rng(number).integers(0, 256, (count, 5, 7))
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            path = root / (name.format(split) + f"-{kind}-ubyte" + (".gz" if packed else ""))
            path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    return root


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), packed=st.booleans(), seed=st.integers(0, 1000))
def test_round_trip(shape, packed, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("file.gz" if packed else "file")
        path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
        read = read_idx(path, dimensions=len(shape))
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), array)


@given(keep=st.integers(0, 15 + 40), packed=st.booleans())
def test_every_truncation_is_noticed(keep, packed):
    whole = idx_bytes(np.zeros((2, 4, 5)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("file.gz" if packed else "file")
        path.write_bytes(gzip.compress(whole[:keep]) if packed else whole[:keep])
        with pytest.raises(ValueError, match=r"file(\.gz)?: "):
            read_idx(path, dimensions=3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["{}", "emnist-digits-{}"])
def test_reads_a_folder_in_mnist_layout(tmp_path, packed, name):
    root = write_idx(tmp_path, name=name, packed=packed)
    train, test = open_idx(root, "train"), open_idx(root, "test")
    assert len(train) == len(test) == 4
    assert train.classes == tuple("0123456789")
    assert [train.label(i) for i in range(4)] == [0, 1, 2, 3]
    expected = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 5, 7)).astype(np.uint8))
    for index in range(4):
        assert torch.equal(test.image(index), expected[index].expand(3, 5, 7))
    assert "t10k-images-idx3-ubyte" in test.source(2)
    assert test.source(2).endswith(" image 2")


def test_a_plain_file_goes_before_its_gzipped_copy(tmp_path):
    root = write_idx(write_idx(tmp_path, packed=True), count=6)
    assert len(open_idx(root, "train")) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x00\x00\x0d\x03" + bytes(12), "begins with 00 00 0d 03, expected 00 00 08 03"),
        (idx_bytes(np.zeros((2, 2))), "begins with 00 00 08 02"),
        (idx_bytes(np.zeros((2, 5, 7)))[:-1], r"promises 70 values \[2, 5, 7\], the file holds only 69"),
        (idx_bytes(np.zeros((2, 5, 7))) + b"x", "the file holds more"),
        (idx_bytes(np.zeros((0, 5, 7))), "holds nothing"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "cannot be read|the file holds only"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    root = write_idx(tmp_path)
    (root / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte: .*({message}).*undamaged copy"):
        open_idx(root, "train")


def test_a_damaged_archive_is_named(tmp_path):
    root = write_idx(tmp_path, packed=True)
    path = root / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"not gzip", whole[:20] + b"\xff" * 20 + whole[40:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: cannot be read \(.+\)"):
            open_idx(root, "train")


def test_labels_are_checked(tmp_path):
    root = write_idx(tmp_path)
    labels = root / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.array([0, 1, 10, 3])))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: label 10 of image 2 is out of range"):
        open_idx(root, "train")
    labels.write_bytes(idx_bytes(np.array([0, 1])))
    with pytest.raises(ValueError, match=r"holds 4 images but .* holds 2 labels"):
        open_idx(root, "train")
    labels.unlink()
    with pytest.raises(ValueError, match=r"no file train-labels-idx1-ubyte\[\.gz\]"):
        open_idx(root, "train")


def test_two_data_sets_in_one_folder_are_not_mixed(tmp_path):
    root = write_idx(write_idx(tmp_path), name="emnist-digits-{}")
    with pytest.raises(ValueError, match="several files"):
        open_idx(root, "train")


def test_real_mnist(real_data):
    train, test = open_idx(real_data / "mnist", "train"), open_idx(real_data / "mnist", "test")
    assert (len(train), len(test)) == (60000, 10000)
    assert train.image(0).shape == (3, 28, 28)
    assert [train.label(i) for i in range(5)] == [5, 0, 4, 1, 9]
