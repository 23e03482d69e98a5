"""DomainNet's own lists: `<domain>_train.txt` and `<domain>_test.txt` beside the images."""

from pathlib import Path

import pytest
from PIL import Image

from batchless.data import open_domains

LINES = {
    "clipart_train.txt": ["clipart/cat/c1.jpg 0", "clipart/ice cream/c2.jpg 1", "clipart/cat/c3.jpg 0"],
    "clipart_test.txt": ["clipart/ice cream/c4.jpg 1"],
    "real_train.txt": ["real/cat/r1.jpg 0"],
    "real_test.txt": ["real/ice cream/r2.jpg 1", "real/cat/r3.jpg 0"],
}


@pytest.fixture(params=["", "splits"], ids=["beside", "in splits/"])
def root(request, tmp_path) -> Path:
    (tmp_path / request.param).mkdir(exist_ok=True)
    for name, lines in LINES.items():
        (tmp_path / request.param / name).write_text("\n".join(lines) + "\n")
        for line in lines:
            path = tmp_path / line.rpartition(" ")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 2)).save(path)
    return tmp_path


def lists(root: Path) -> Path:
    return root / "splits" if (root / "splits").is_dir() else root


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_domain_has_the_images_of_its_list_in_order(root, split):
    domains = open_domains(root, split)
    assert list(domains) == ["clipart", "real"]
    for name, images in domains.items():
        found = [f"{images.source(i)} {images.label(i)}" for i in range(len(images))]
        assert found == [f"{root}/{line}" for line in LINES[f"{name}_{split}.txt"]]
        assert images.classes == ("cat", "ice cream")
        assert images.image(0).shape == (3, 2, 3)


def test_some_classes_of_a_list(root):
    images = open_domains(root, "train", domains=["clipart"], classes=["ice cream"])["clipart"]
    assert [images.source(i) for i in range(len(images))] == [f"{root}/clipart/ice cream/c2.jpg"]
    with pytest.raises(ValueError, match=r"domain 'real' in .*: no train image of the classes ice cream"):
        open_domains(root, "train", classes=["ice cream"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("real_test.txt", "real/cat/r3.jpg", "real_test.txt line 1: 'real/cat/r3.jpg', expected"),
        ("real_test.txt", "real/cat/r3.jpg zero", "line 1: 'real/cat/r3.jpg zero', expected"),
        ("real_test.txt", "real/cat/r3.jpg 0\n\n", "line 2: '', expected"),
        ("real_test.txt", "/etc/passwd 0", "line 1: '/etc/passwd 0', expected"),
        ("real_test.txt", "real/../../secret/r3.jpg 0", "line 1: .*, expected"),
        ("real_test.txt", "real/dog/r9.jpg 0", "line 1: label 0 is 'cat' before and 'dog' here"),
        ("real_test.txt", "real/cat/r3.jpg 1", "class 'cat' has several labels"),
        ("real_test.txt", "real/dog/r9.jpg 2", "no image has label 1, but there are labels up to 2"),
        (
            "real_test.txt",
            "real/ice cream/r9.jpg 1",
            "real/ice cream/r9.jpg: no such file, but .*real_test.txt lists it",
        ),
        ("real_test.txt", "", "real_test.txt: lists no image"),
        ("real_test.txt", None, "real_test.txt: no such file; every domain needs _train.txt and _test.txt"),
        ("real_train.txt", None, "real_train.txt: no such file"),
    ],
)
def test_a_list_in_disorder_is_named(root, name, text, message):
    if text is None:
        (lists(root) / name).unlink()
    else:
        (lists(root) / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        open_domains(root, "test")
    assert "\n" not in str(error.value)


def test_a_list_that_is_no_text_is_named(root):
    (lists(root) / "real_train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"real_train.txt: cannot be read as text"):
        open_domains(root, "train")
