import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from batchless.data import open_images
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


def test_a_flat_test_folder_gives_way_to_val(tmp_path):
    root = write_folders(tmp_path, splits=("train", "val"), count=2)
    (root / "test").mkdir()
    (root / "test" / "0.jpg").touch()
    assert len(open_folders(root, "test")) == 4
    # ImageNet's validation images, as they are downloaded: no folder of a class anywhere.
    flat = write_folders(tmp_path / "flat", splits=("train",))
    (flat / "val").mkdir()
    (flat / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(ValueError, match="flat/val: no class folders in it; put the files of each class into"):
        open_folders(flat, "train")


def test_a_thousand_classes_are_listed_without_opening_an_image(tmp_path):
    for split in ("train", "val"):
        for label in range(1000):
            (tmp_path / split / f"n{label:08d}").mkdir(parents=True)
            (tmp_path / split / f"n{label:08d}" / "0.JPEG").touch()
    images = open_images(tmp_path, "test")
    assert (len(images), len(images.classes), images.label(999)) == (1000, 1000, 999)
    with pytest.raises(ValueError, match=r"val/n00000123/0.JPEG: cannot be read as an image"):
        images.image(123)


def test_hidden_files_and_folders_do_not_count(tmp_path):
    root = write_folders(tmp_path)
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / ".ipynb_checkpoints").mkdir()
    Image.fromarray(picture()).save(root / "train" / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png")
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


def test_a_link_that_leads_back_is_named(tmp_path):
    root = write_folders(tmp_path)
    (root / "train" / "ant" / "again").symlink_to(root / "train" / "ant")
    with pytest.raises(
        ValueError, match=r"train/ant/again\S*: cannot be listed \(.+\); correct or remove this folder$"
    ):
        open_folders(root, "train")


def save_turned(path: Path, array: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(array).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    save_turned(tmp_path / "turned.png", picture(), orientation)
    with Image.open(tmp_path / "turned.png") as file:
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(file))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "turned.png"), expected)


def test_six_is_a_camera_turned_to_the_right(tmp_path):
    save_turned(tmp_path / "turned.png", picture(), 6)  # rotate by 90 degrees clockwise to see the scene upright
    expected = torch.from_numpy(np.rot90(picture(), k=-1).copy()).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "turned.png"), expected)


DAMAGED_EXIF = {
    "truncated": b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06",
    "no directory": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "longer than the file": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\0\0\0\x06\0\0\0\0\0\0\0",
    # A date that is a number, with which `ImageOps.exif_transpose` fails.
    "another type": b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x32\x01\x0b\0\x01\0\0\0abcd\0\0\0\0",
}


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
def test_damaged_exif_data_do_not_matter(tmp_path, kind):
    image = Image.fromarray(picture(16, 16))
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "image.jpg", exif=DAMAGED_EXIF[kind])
    plain = read_image(tmp_path / "plain.jpg")
    found = read_image(tmp_path / "image.jpg")
    assert any(torch.equal(found, view) for view in (plain, plain.rot90(-1, (1, 2))))


def test_another_format_than_the_name_says_is_read(tmp_path):
    """ImageNet has a PNG file named .JPEG."""
    Image.fromarray(picture()).save(tmp_path / "image.JPEG", format="PNG")
    assert torch.equal(read_image(tmp_path / "image.JPEG"), torch.from_numpy(picture()).permute(2, 0, 1))


def test_cmyk_jpeg_has_the_colours_of_the_rgb_one(tmp_path):
    """ImageNet has some of them; ink is written inverted, and read back without it would be a negative."""
    smooth = np.linspace(0, 255, 16 * 16 * 3).reshape(3, 16, 16).transpose(1, 2, 0).astype(np.uint8)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "image.jpg", quality=100)
    difference = read_image(tmp_path / "image.jpg").int() - torch.from_numpy(smooth).permute(2, 0, 1).int()
    assert difference.abs().max() < 12


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(picture(seed=seed)).convert("P") for seed in range(3)]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "image.gif").shape == (3, 6, 9)


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


def test_sixteen_bits_of_each_colour_keep_their_brightness(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (6, 9, 3), dtype=np.uint16)
    write_png(tmp_path / "image.png", values)
    assert torch.equal(
        read_image(tmp_path / "image.png"), torch.from_numpy((values >> 8).astype(np.uint8)).permute(2, 0, 1)
    )


def write_png(path: Path, values: np.ndarray) -> None:
    """A PNG file of 16 bits for each of three colours, which PIL can read but not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


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
