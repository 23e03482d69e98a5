"""A domain in a NumPy archive, with or without a split; never a pickle."""

from pathlib import Path

import numpy as np
import pytest
import torch

from batchless.data import open_domains

GENERATOR = np.random.default_rng(0)
COLOUR = GENERATOR.integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (20, 5, 6), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 2


def write(root: Path, name: str, **changes: object) -> None:
    arrays = {
        "train_images": COLOUR[:8],
        "train_labels": LABELS[:8, None],
        "test_images": COLOUR[8:],
        "test_labels": LABELS[8:12, None],
    }
    np.savez(root / f"{name}.npz", **{key: value for key, value in (arrays | changes).items() if value is not None})


def test_a_split_of_its_own_is_kept(tmp_path):
    write(tmp_path, "camelyon")
    write(tmp_path, "breakhis", classes=np.array(["0", "1"]))
    for split, chosen in (("train", slice(0, 8)), ("test", slice(8, 12))):
        domains = open_domains(tmp_path, split)
        assert list(domains) == ["breakhis", "camelyon"]
        for images in domains.values():
            assert [images.label(i) for i in range(len(images))] == LABELS[:12][chosen].tolist()
            for index, expected in enumerate(COLOUR[chosen]):
                assert torch.equal(images.image(index), torch.from_numpy(expected).permute(2, 0, 1))
    assert domains["camelyon"].source(2) == f"{tmp_path}/camelyon.npz test_images 2"


def test_an_archive_without_split_is_split_like_a_tree(tmp_path):
    np.savez(tmp_path / "one.npz", images=GREY, labels=LABELS, classes=np.array(["even", "odd"]))
    train, test = (open_domains(tmp_path, split)["one"] for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert sorted(train.indices + test.indices) == list(range(20))
    assert [test.label(i) for i in range(4)].count(0) == 2
    assert torch.equal(test.image(0), torch.from_numpy(GREY[test.indices[0]]).expand(3, -1, -1))
    assert test.classes == ("even", "odd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None}, r"no array 'train_labels', there are test_images, test_labels, train_images"),
        ({"train_images": COLOUR[:7]}, "7 images but 8 labels"),
        ({"train_images": COLOUR[:8].astype(float)}, "train_images is float64"),
        ({"train_images": COLOUR[:8, :, :, :2]}, r"train_images is uint8 \[8, 5, 6, 2\]"),
        ({"train_labels": LABELS[:8].astype(float)}, "train_labels is float64"),
        ({"train_labels": np.eye(8, dtype=int)}, r"train_labels is int64 \[8, 8\], expected integers \[n\]"),
        ({"train_labels": -LABELS[:8].astype(int)}, "label -1 of image 1 is out of range"),
        ({"classes": np.array(["a"])}, "label 1 of image 1 is out of range, there are 1 classes"),
        ({"classes": np.array(["a", "a"])}, "expected different names"),
        ({"classes": np.array([1, 2])}, "expected different names"),
        ({"train_labels": np.array([{}] * 8)}, "Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_an_archive_in_disorder_is_named(tmp_path, changes, message):
    write(tmp_path, "one", **changes)
    with pytest.raises(ValueError, match=f"one.npz: .*{message}") as error:
        open_domains(tmp_path, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x80\x04N.", b"plain text"])
def test_a_file_that_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "one.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"one.npz: cannot be read"):
        open_domains(tmp_path, "train")


def test_a_bare_array_under_the_name_of_an_archive_is_named(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, GREY)
    with pytest.raises(ValueError, match=r"one.npz: cannot be read"):
        open_domains(tmp_path, "train")


def test_archives_of_different_classes_are_refused(tmp_path):
    write(tmp_path, "one")
    write(tmp_path, "two", train_labels=np.arange(8) % 3)
    with pytest.raises(ValueError, match="class '2' is in 'two' but not in 'one'"):
        open_domains(tmp_path, "train")
