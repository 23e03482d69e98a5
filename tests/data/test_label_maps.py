import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from batchless.data.label_classes import CITYSCAPES, VOC_CLASSES, label_colours, voc_colours
from batchless.data.label_maps import read_label_map
from batchless.data.open_label_maps import open_label_maps
from batchless.data.scattered_digits import scattered_digits
from batchless.data.scattered_maps import scattered_maps
from small_maps import save_image, save_map, scene, write_cityscapes, write_folders, write_voc


def labels_of(seed: int) -> torch.Tensor:
    return torch.from_numpy(scene(seed)[1])


def test_folders_with_and_without_names(tmp_path):
    write_folders(tmp_path)
    for split, first, count in (("train", 0, 8), ("test", 100, 4)):
        images = open_label_maps(tmp_path, split)
        assert (len(images), images.classes, images.notes()) == (count, ("0", "1", "2"), [])
        for index in range(count):
            image, labels = images.sample(index)
            assert torch.equal(labels, labels_of(first + index))
            assert torch.equal(image, torch.from_numpy(scene(first + index)[0]).permute(2, 0, 1))
    (tmp_path / "classes.txt").write_text("ground\ncat\ndog\n\n")
    assert open_label_maps(tmp_path, "test").classes == ("ground", "cat", "dog")
    named = open_label_maps(tmp_path, "test", class_names=("a", "b"), ignore=(2, 255))
    assert named.classes == ("a", "b")
    assert set(named.sample(0)[1].unique().tolist()) <= {0, 1, 255}


def test_values_with_gaps_are_classes_in_their_order(tmp_path):
    write_folders(tmp_path, train=2, test=1)
    for path in tmp_path.glob("*/labels/*.png"):
        values = np.asarray(Image.open(path))
        save_map(np.where(values == 1, 40, np.where(values == 2, 7, values)).astype(np.uint8), path)
    images = open_label_maps(tmp_path, "test")
    assert images.classes == ("0", "7", "40")
    expected = labels_of(100)
    table = torch.arange(256, dtype=torch.uint8)
    table[1], table[2] = 2, 1
    assert torch.equal(images.sample(0)[1], table[expected.long()])


def test_folders_the_other_way_round_and_other_names(tmp_path):
    write_folders(tmp_path / "a")
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            target = tmp_path / "b" / {"labels": "masks"}.get(kind, kind) / {"test": "val"}.get(split, split)
            shutil.copytree(tmp_path / "a" / split / kind, target)
    for path in (tmp_path / "b" / "masks").glob("*/*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    one, other = open_label_maps(tmp_path / "a", "test"), open_label_maps(tmp_path / "b", "test")
    assert all(torch.equal(one.sample(i)[1], other.sample(i)[1]) for i in range(4))


def test_missing_maps_are_counted_and_all_missing_is_an_error(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "labels" / "003.png").unlink()
    (tmp_path / "train" / "images" / "005.png").unlink()
    images = open_label_maps(tmp_path, "train")
    assert len(images) == 6
    assert images.notes() == ["1 images without a label map, left out", "1 label maps without an image"]
    for path in (tmp_path / "test" / "labels").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"none of the 4 images here has a label map, such as .*100\.png"):
        open_label_maps(tmp_path, "test", class_names=("a", "b", "c"))


@pytest.mark.parametrize("aug", [False, True])
def test_voc_with_and_without_sbd(tmp_path, aug):
    write_voc(tmp_path, aug=aug)
    train, val = open_label_maps(tmp_path, "train"), open_label_maps(tmp_path, "test")
    assert (len(train), len(val), train.classes) == (5 if aug else 3, 2, tuple(VOC_CLASSES))
    assert all(torch.equal(train.sample(i)[1], labels_of(i)) for i in range(len(train)))
    assert torch.equal(val.sample(1)[1], labels_of(101))
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    if aug:
        shutil.rmtree(folder / "SegmentationClassAug")
        with pytest.raises(ValueError, match=r"trainaug\.txt: 003 has a label map neither .* SBD's maps are needed"):
            open_label_maps(tmp_path, "train")
    else:
        (folder / "JPEGImages" / "001.jpg").unlink()
        with pytest.raises(ValueError, match=r"train\.txt: there is no image .*001\.jpg"):
            open_label_maps(tmp_path, "train")
        (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
        with pytest.raises(ValueError, match="the list names no image"):
            open_label_maps(tmp_path, "test")


@pytest.mark.parametrize("train_ids", [False, True])
def test_cityscapes_ids_are_those_that_are_trained(tmp_path, train_ids):
    write_cityscapes(tmp_path, train_ids=train_ids)
    images = open_label_maps(tmp_path, "test")
    assert (len(images), images.classes) == (2, tuple(CITYSCAPES))
    expected = labels_of(100)
    if not train_ids:
        expected[2] = 255
    assert torch.equal(images.sample(0)[1], expected)
    (tmp_path / "gtFine" / "train" / "ulm").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="none of the 3 images here has a label map"):
        open_label_maps(tmp_path, "train")
    with pytest.raises(ValueError, match=r"class_names names 1 classes and Cityscapes has its own"):
        open_label_maps(tmp_path, "test", class_names=("a",))


def test_a_sample_that_does_not_fit_names_its_file(tmp_path):
    write_folders(tmp_path, train=5, test=1)
    maps, names = tmp_path / "train" / "labels", ("a", "b", "c")
    save_map(scene(0, height=20)[1], maps / "000.png")
    save_map(np.full((24, 32), 9, np.uint8), maps / "001.png")
    (maps / "002.png").write_bytes((maps / "002.png").read_bytes()[:60])
    (tmp_path / "train" / "images" / "003.png").write_text("no image")
    images = open_label_maps(tmp_path, "train", class_names=names)
    for index, message in (
        (0, r"000\.png: the label map is 32x20 pixels, its image .*000\.png 32x24"),
        (1, r"001\.png: 768 pixels have the value 9, which is none of the 3 classes and not ignored \(255\)"),
        (2, r"002\.png: cannot be read as a label map"),
        (3, r"003\.png: cannot be read as an image"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            images.sample(index)
        assert "\n" not in str(error.value)


def test_how_maps_are_stored(tmp_path):
    _, labels = scene(0)
    path = tmp_path / "map.png"
    save_map(labels, path, palette=True)
    assert torch.equal(read_label_map(path), torch.from_numpy(labels))
    save_map(np.stack([labels] * 3, 2), path)
    assert torch.equal(read_label_map(path), torch.from_numpy(labels))
    Image.fromarray(labels.astype(np.uint16)).save(path)
    assert torch.equal(read_label_map(path), torch.from_numpy(labels))
    Image.fromarray(labels > 0).save(path)
    assert torch.equal(read_label_map(path), torch.from_numpy((labels > 0).astype(np.uint8)))
    save_image(scene(0)[0], path)
    with pytest.raises(ValueError, match="this label map has colours"):
        read_label_map(path)
    Image.fromarray(labels.astype(np.uint16) * 4).save(path)
    with pytest.raises(ValueError, match="has the value 1020, where 0 to 255 are possible"):
        read_label_map(path)
    save_image(scene(0)[0], tmp_path / "map.jpg")
    with pytest.raises(ValueError, match=r"map\.jpg: cannot be read as a label map"):
        read_label_map(tmp_path / "map.jpg")


COLOURS = np.zeros((256, 3), np.uint8)
COLOURS[[0, 1, 2, 255]] = [[128, 64, 0], [0, 0, 192], [7, 7, 7], [0, 0, 0]]
PALETTE = "sky 128 64 0\ntraffic light\t0 0 192\ngrey 7 7 7\nignored 0 0 0\n"


def coloured_folders(root):
    """The folders of `write_folders` with maps of colours."""
    write_folders(root, train=2, test=1)
    for path in root.glob("*/labels/*.png"):
        save_image(COLOURS[np.asarray(Image.open(path))], path)
    (root / "classes.txt").write_text(PALETTE)
    return root


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_maps_of_colours_are_read_by_a_palette(tmp_path, mode):
    root = coloured_folders(tmp_path)
    for path in root.glob("*/labels/*.png"):
        Image.open(path).convert(mode).save(path)
    maps = open_label_maps(root, "train")
    assert maps.classes == ("sky", "traffic light", "grey")
    for seed in range(2):
        assert torch.equal(maps.sample(seed)[1], torch.from_numpy(scene(seed)[1]))
    again = pickle.loads(pickle.dumps(maps.images[1].read_map))
    assert torch.equal(again(), maps.images[1].read_map())


def test_several_colours_of_one_class(tmp_path):
    root = coloured_folders(tmp_path)
    (root / "classes.txt").write_text(PALETTE.replace("grey", "sky"))
    maps = open_label_maps(root, "test")
    labels = scene(100)[1].copy()
    labels[labels == 2] = 0
    assert maps.classes == ("sky", "traffic light")
    assert torch.equal(maps.sample(0)[1], torch.from_numpy(labels))


def test_a_colour_that_the_palette_has_not_names_image_colour_and_place(tmp_path):
    root = coloured_folders(tmp_path)
    path = root / "train" / "labels" / "001.png"
    values = np.asarray(Image.open(path)).copy()
    values[5, 7], values[9, 2] = (1, 2, 3), (3, 2, 1)
    save_image(values, path)
    says = (
        r"001\.png: 2 pixels have colours .*first 1 2 3 \(red green blue\) in row 5, column 7: add a line `name 1 2 3`"
    )
    with pytest.raises(ValueError, match=says):
        open_label_maps(root, "train").sample(1)


def test_palettes_in_disorder(tmp_path):
    root = coloured_folders(tmp_path)
    for line in ("tree", "tree 1 2 256", "tree 7 7 7"):
        (root / "classes.txt").write_text(f"{PALETTE}{line}\n")
        with pytest.raises(ValueError, match=f"classes.txt: '{line}' has no colour of its own"):
            open_label_maps(root, "train")
    (root / "classes.txt").write_text(PALETTE)
    with pytest.raises(ValueError, match=r"names 1 classes and .*classes\.txt, with a palette, has its own"):
        open_label_maps(root, "train", class_names=("a",))


def test_unknown_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no known layout; possible are Cityscapes"):
        open_label_maps(tmp_path, "train")
    with pytest.raises(ValueError, match="does not exist"):
        open_label_maps(tmp_path / "none", "train")
    with pytest.raises(ValueError, match="the embedded sample has its own"):
        open_label_maps(None, "train", class_names=("a",))


def test_the_embedded_maps_are_the_digits_masks():
    images, digits = scattered_maps("test", count=8), scattered_digits("test", count=8)
    for index, known in enumerate(digits.images):
        image, labels = images.sample(index)
        assert torch.equal(image, known.image())
        expected = torch.zeros(96, 96, dtype=torch.uint8)
        for mask, label in zip(known.masks(), known.labels.tolist(), strict=True):
            expected[mask.bool()] = label + 1
        assert torch.equal(labels, expected)
    with pytest.raises(ValueError, match="count=0"):
        scattered_maps("test", count=0)


def test_colours_tell_classes_apart():
    assert voc_colours(21)[-1].tolist() == [0, 64, 128]  # tvmonitor, as in VOC's devkit
    for classes in (VOC_CLASSES, list(CITYSCAPES), [str(number) for number in range(200)]):
        colours = label_colours(classes)
        assert len(colours.unique(dim=0)) == len(colours) == len(classes)
    assert label_colours(["road"]).tolist() == [[128, 0, 0]]


def test_camvid(real_data):
    root = real_data / "camvid"
    if not root.is_dir():
        pytest.skip(f"needs CamVid in {root}")
    names = tuple("sky building pole road pavement tree sign fence car pedestrian cyclist".split())
    train, test = (open_label_maps(root, split, class_names=names, ignore=(11,)) for split in ("train", "test"))
    assert (len(train), len(test), train.notes()) == (367, 233, [])
    image, labels = train.sample(100)
    assert image.shape == (3, 360, 480)
    assert set(labels.unique().tolist()) <= {*range(11), 255}
    # Without settings, the void is a class like the others.
    assert open_label_maps(root, "test").classes == tuple(map(str, range(12)))
