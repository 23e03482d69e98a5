from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchless.data.folders import open_folders, read_image


def picture(height: int = 6, width: int = 9, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_folders(root: Path, *, classes=("ant", "bee"), splits=("train", "test"), count: int = 3) -> Path:
    """An image folder tree of PNG files."""
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(picture(seed=10 * label + number)).save(root / split / name / f"{number}.png")
    return root


@pytest.mark.parametrize("held_out", ["test", "val", "valid"])
def test_reads_a_tree(tmp_path, held_out):
    root = write_folders(tmp_path, splits=("train", held_out))
    for split in ("train", "test"):
        images = open_folders(root, split)
        assert images.classes == ("ant", "bee")
        assert [images.label(i) for i in range(len(images))] == [0, 0, 0, 1, 1, 1]
        for index in range(6):
            expected = torch.from_numpy(picture(seed=10 * (index // 3) + index % 3)).permute(2, 0, 1)
            assert torch.equal(images.image(index), expected)
        assert images.source(4) == str(root / ("train" if split == "train" else held_out) / "bee" / "1.png")


def test_test_goes_before_val(tmp_path):
    root = write_folders(write_folders(tmp_path, splits=("train", "val"), count=1), splits=("test",), count=2)
    assert len(open_folders(root, "test")) == 4


def test_hidden_files_and_folders_do_not_count(tmp_path):
    root = write_folders(tmp_path)
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "._0.png").write_bytes(b"what a Mac leaves on a USB stick")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    assert len(open_folders(root, "train")) == 6


def test_subfolders_and_upper_case_names_count(tmp_path):
    root = write_folders(tmp_path)
    (root / "train" / "ant" / "more").mkdir()
    Image.fromarray(picture()).save(root / "train" / "ant" / "more" / "X.PNG")
    assert len(open_folders(root, "train")) == 7


@pytest.mark.parametrize(("present", "absent"), [("train", "test"), ("test", "train")])
def test_a_class_in_one_split_only_is_named(tmp_path, present, absent):
    root = write_folders(tmp_path)
    (root / present / "cat").mkdir()
    with pytest.raises(ValueError, match=f"{present}/cat: there is no class folder .*{absent}/cat"):
        open_folders(root, "train")


def test_an_empty_class_is_named(tmp_path):
    root = write_folders(tmp_path)
    for path in (root / "test" / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match="test/bee: no image in this class folder"):
        open_folders(root, "test")


def test_a_split_without_classes_is_named(tmp_path):
    root = write_folders(tmp_path, splits=("train",))
    (root / "test").mkdir()
    with pytest.raises(ValueError, match="/test: no class folders"):
        open_folders(root, "test")


def test_exif_orientation_is_honoured(tmp_path):
    array = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see the scene upright
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.rot90(array, k=-1).copy()).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "turned.png"), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "image.tiff")
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "image.tiff"), expected)


def test_transparent_palettes_do_not_warn(tmp_path):
    image = Image.fromarray(picture()).convert("P")
    image.save(tmp_path / "image.png", transparency=bytes(range(256)))
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "image.png"), expected)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    values = np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)
    Image.fromarray(values).save(tmp_path / "image.png")
    expected = torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 6, 10)
    assert torch.equal(read_image(tmp_path / "image.png"), expected)


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"cannot be read as an image \(.+\); replace or remove this file") as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".ppm", ".tiff"])
@pytest.mark.parametrize("part", [0, 0.3, 0.7])
def test_truncated_files_are_named(tmp_path, suffix, part):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(picture(64, 64)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    refused(path)


def test_other_files_are_named(tmp_path):
    for name, content in (
        ("text.jpg", b"not an image"),
        ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)
    refused(tmp_path / "missing.jpg")
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "floats.tiff")
    assert "mode F" in refused(tmp_path / "floats.tiff")


@pytest.mark.parametrize("limit", [40, 20])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    """PIL warns above its limit and raises above twice its limit: 54 pixels are above 40, and above twice 20."""
    Image.fromarray(picture()).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "decompression bomb" in refused(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 54)
    assert read_image(tmp_path / "image.png").shape == (3, 6, 9)


def test_real_cifar10(real_data):
    train, test = open_folders(real_data / "cifar10", "train"), open_folders(real_data / "cifar10", "test")
    assert (len(train), len(test), len(train.classes)) == (50000, 10000, 10)
    assert test.image(123).shape == (3, 32, 32)
