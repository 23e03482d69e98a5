"""FLamby's Fed-ISIC2019: its list and the images beside it."""

from pathlib import Path

import pytest
from PIL import Image

from batchless.data import open_domains

HEADER = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK,target,center,fold,fold2"
ROWS = [
    ("ISIC_1", 1, 0, "train"),
    ("ISIC_2", 2, 0, "test"),
    ("ISIC_3_downsampled", 0, 4, "train"),
    ("ISIC_4", 7, 4, "test"),
]


def row(image: str, target: object, center: object, fold: str) -> str:
    one_hot = ["1.0" if target == place else "0.0" for place in range(9)]
    return ",".join([image, *one_hot, str(target), str(center), fold, f"{fold}_{center}"])


@pytest.fixture(params=["train_test_split", "train_test_split.csv"])
def listing(request, tmp_path) -> Path:
    images = tmp_path / "ISIC_2019_Training_Input_preprocessed"
    images.mkdir()
    for name, *_ in ROWS:
        Image.new("RGB", (3, 2)).save(images / f"{name}.jpg")
    path: Path = tmp_path / request.param
    path.write_text("\n".join([HEADER, *(row(*values) for values in ROWS)]) + "\n")
    return path


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_center_has_its_images_of_the_split(listing, split):
    domains = open_domains(listing.parent, split)
    expected = {"center_0": [], "center_4": []}
    for image, target, center, fold in ROWS:
        if fold == split:
            expected[f"center_{center}"].append((f"{image}.jpg", target))
    found = {name: [(Path(d.source(i)).name, d.label(i)) for i in range(len(d))] for name, d in domains.items()}
    assert found == expected
    assert domains["center_0"].classes == ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
    assert domains["center_0"].image(0).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row("ISIC_9", 1, 0, "train"), "ISIC_9.jpg: no such file, but .*train_test_split.* lists it"),
        (row("ISIC_1", 8, 0, "train"), "line 6: .*'target': '8'.*expected"),
        (row("ISIC_1", 1, "x", "train"), "line 6: .*'center': 'x'"),
        (row("ISIC_1", 1, 0, "valid"), "line 6: .*'fold': 'valid'"),
        (row("../../secret", 1, 0, "train"), "line 6: .*secret"),
        ("ISIC_1,1.0", "line 6: .*'target': None"),
    ],
)
def test_a_row_in_disorder_is_named(listing, line, message):
    listing.write_text(listing.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        open_domains(listing.parent, "train")
    assert "\n" not in str(error.value)


def test_a_list_of_something_else_is_named(listing):
    listing.write_text("image,label\nx,1\n")
    with pytest.raises(
        ValueError, match=r"not FLamby's list of Fed-ISIC2019 .no column 'target', there are image, label"
    ):
        open_domains(listing.parent, "train")
    listing.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not FLamby's list of Fed-ISIC2019"):
        open_domains(listing.parent, "train")


def test_a_center_without_test_images_is_named(listing):
    listing.write_text("\n".join([HEADER, *(row(*values) for values in ROWS[:3])]))
    with pytest.raises(ValueError, match="no test image of center 4"):
        open_domains(listing.parent, "test")


def test_missing_images_are_named(listing):
    folder = listing.parent / "ISIC_2019_Training_Input_preprocessed"
    folder.rename(listing.parent / "elsewhere")
    with pytest.raises(
        ValueError, match="no folder ISIC_2019_Training_Input_preprocessed or ISIC_2019_Training_Input bes"
    ):
        open_domains(listing.parent, "train")
