import json
from pathlib import Path

import numpy as np
import pytest
import torch
from object_files import CLASSES, HEIGHT, OBJECTS, WIDTH, voc_xml, write_coco, write_voc
from PIL import Image

from batchless.data.objects import boxes_of, packed_masks
from batchless.data.open_objects import open_objects
from batchless.data.voc import read_xml

_OF_PYCOCOTOOLS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("split", ["train", "test"])
def test_voc_and_coco_agree(tmp_path, split):
    coco, voc = open_objects(write_coco(tmp_path / "coco"), split), open_objects(write_voc(tmp_path / "voc"), split)
    assert coco.classes == voc.classes == CLASSES
    assert len(coco) == len(voc) == len(OBJECTS)
    for one, other in zip(coco.images, voc.images, strict=True):
        assert torch.equal(one.image(), other.image())
        for name in ("boxes", "labels", "crowd", "areas"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert coco.notes() == voc.notes() == ["1 images without objects, kept"]
    assert coco.has_masks
    assert not voc.has_masks


def test_boxes_are_where_the_objects_are(tmp_path):
    images = open_objects(write_coco(tmp_path), "test")
    for image, objects in zip(images.images, OBJECTS, strict=True):
        masks = image.masks()
        assert masks.shape == (len(objects), HEIGHT, WIDTH)
        for mask, (_, left, top, right, bottom) in zip(masks, objects, strict=True):
            expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
            expected[top : bottom + 1, left : right + 1] = 1
            assert torch.equal(mask, expected)
        if len(objects):
            assert torch.equal(boxes_of(masks), image.boxes)


@_OF_PYCOCOTOOLS
def test_masks_in_every_form_of_coco_are_the_same(tmp_path):
    from pycocotools import mask as coder

    def change(content):
        for number, item in enumerate(content["annotations"]):
            packed = coder.merge(coder.frPyObjects(item["segmentation"], HEIGHT, WIDTH))
            if number % 3 == 1:
                item["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
            elif number % 3 == 2:
                flat = coder.decode(packed).flatten(order="F")
                changes = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
                item["segmentation"] = {
                    "size": packed["size"],
                    "counts": np.diff(np.r_[0, changes]).tolist(),
                }

    plain, mixed = (
        open_objects(write_coco(tmp_path / name, change=change), "test")
        for name, change in (("plain", lambda content: None), ("mixed", change))
    )
    for one, other in zip(plain.images, mixed.images, strict=True):
        assert torch.equal(one.masks(), other.masks())


def test_packing_masks_and_reading_them_again_changes_nothing(tmp_path):
    image = open_objects(write_coco(tmp_path), "test").images[3]
    packed = packed_masks(image.masks())
    assert [item["counts"] for item in packed] == [image.run_lengths(index)["counts"] for index in range(len(image))]
    assert packed_masks(torch.zeros(0, 4, 4, dtype=torch.uint8)) == ()


def _add(content, **changes):
    item = {"id": 99, "image_id": 100, "category_id": 10, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    square = {"segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
    content["annotations"].append({**item, **square, **changes})


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"bbox": [3, 3, 0, 5]}, "1 boxes without area, left out"),
        ({"bbox": [3, 3, -2, 5]}, "1 boxes without area, left out"),
        ({"bbox": [40, 3, 5, 5]}, "1 boxes without area, left out"),
        ({"bbox": [float("nan"), 3, 5, 5]}, "1 boxes that are not finite, left out"),
        ({"category_id": 77}, "1 objects of an unknown category, left out"),
        ({"image_id": 1}, "1 objects of an image that is not listed, left out"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, changes, note):
    plain = open_objects(write_coco(tmp_path / "plain"), "test")
    images = open_objects(write_coco(tmp_path / "odd", change=lambda content: _add(content, **changes)), "test")
    assert [len(image) for image in images.images] == [len(image) for image in plain.images]
    assert note in images.notes()


def test_boxes_are_cut_at_the_border_and_crowds_kept_apart(tmp_path):
    def change(content):
        _add(content, bbox=[-3, 15, 10, 10])
        _add(content, iscrowd=1)

    images = open_objects(write_coco(tmp_path, change=change), "test")
    first = images.images[0]
    assert first.boxes[2].tolist() == [0, 15, 7, 20]
    assert first.crowd.tolist() == [False, False, False, True]
    assert {"1 boxes cut at the image's border", "1 crowds or difficult objects, not learned"} <= set(images.notes())
    assert len(first.only(~first.crowd)) == 3


def _replaced(key, value):
    def change(content):
        content["annotations"][0][key] = value

    return change


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [HEIGHT, WIDTH], "counts": [5, 10**9]},
        {"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]},
        {"size": [HEIGHT, WIDTH], "counts": "PPPPPPPP99"},
        {"size": [HEIGHT, WIDTH], "counts": "\x00\x7f"},
        {"size": [9, 9], "counts": [81]},
        {"size": [HEIGHT, WIDTH]},
        [[1, 2, 3]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, 1e9]],
        [["a"] * 6],
    ],
)
def test_damaged_masks_are_told_with_their_image(tmp_path, segmentation):
    root = write_coco(tmp_path, change=_replaced("segmentation", segmentation))
    first = open_objects(root, "test").images[0]
    with pytest.raises(ValueError, match=r"000\.jpg: the mask of object 1 of 2 is damaged") as raised:
        first.masks()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replaced("bbox", [1, 2, 3]), r"instances_val2017\.json: an object of 000\.jpg is damaged"),
        (_replaced("bbox", "no"), r"instances_val2017\.json: an object of 000\.jpg is damaged"),
        (lambda content: content.pop("categories"), r"no list 'categories'"),
        (lambda content: content["images"][0].pop("file_name"), r"an entry lacks something"),
        (lambda content: content["images"][0].pop("height"), r"an object of 000\.jpg is damaged"),
        (lambda content: content["images"][0].update(file_name="lost.jpg"), r"lost\.jpg and 0 more of the 4 images"),
        (lambda content: content["images"].clear(), r"it names no image"),
    ],
)
def test_damaged_annotations_are_told_with_their_file(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        open_objects(write_coco(tmp_path, change=change), "test")
    assert "\n" not in str(raised.value)


def test_an_image_of_another_size_is_told(tmp_path):
    root = write_coco(tmp_path)
    Image.new("RGB", (7, 5)).save(root / "val2017" / "001.jpg")
    images = open_objects(root, "test").images
    images[0].image()
    with pytest.raises(ValueError, match=r"001\.jpg: the image is 7x5 pixels, its annotation says 24x20"):
        images[1].image()


def test_one_file_of_annotations_is_split(tmp_path):
    root = write_coco(tmp_path, splits=["val2017"])
    train, test = open_objects(root, "train"), open_objects(root, "test")
    assert (len(train), len(test)) == (3, 1)
    assert not {image.source for image in train.images} & {image.source for image in test.images}
    assert "1 images of instances_val2017.json are for test: it is the only file" in test.notes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no xml", "no annotation"),
        ("<annotation>", "no annotation"),
        ("", "no annotation"),
        ('<!DOCTYPE a [<!ENTITY x "xx">]><annotation>&x;</annotation>', "declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation>" + " " * 2**20 + "</annotation>", "bytes, where an annotation has at most"),
    ],
)
def test_odd_xml_is_refused(tmp_path, text, message):
    file = tmp_path / "odd.xml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_xml(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_document_type_hidden_in_another_encoding_is_refused(tmp_path):
    file = tmp_path / "odd.xml"
    file.write_bytes('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY x "x">]><a>&x;</a>'.encode("utf-16"))
    with pytest.raises(ValueError, match="declares a document type"):
        read_xml(file)


def _change_first(root: Path, old: str, new: str) -> Path:
    file = root / "Annotations" / "000.xml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return root


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmin>3</xmin>", "<xmin>three</xmin>", r"000\.xml: <bndbox><xmin> is 'three', no number"),
        ("<xmin>3</xmin>", "", r"000\.xml: an <object> has no <bndbox><xmin>"),
        ("<name>cat</name>", "<name></name>", r"000\.xml: an <object> has no <name>"),
        ("<width>24</width>", "", r"000\.xml: an <annotation> has no <size><width>"),
    ],
)
def test_damaged_voc_annotations_are_told_with_their_file(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        open_objects(_change_first(write_voc(tmp_path), old, new), "train")


def test_voc_knows_difficult_objects_and_classes_of_the_test_images_alone(tmp_path):
    root = _change_first(write_voc(tmp_path), "<difficult>0</difficult>", "<difficult>1</difficult>")
    assert open_objects(root, "train").images[0].crowd.tolist() == [True, True]
    (root / "Annotations" / "new.xml").write_text(voc_xml("000.jpg", [("yak", 1, 1, 5, 5)]))
    (root / "ImageSets" / "Main" / "val.txt").write_text("new\n")
    test = open_objects(root, "test")
    assert test.classes == CLASSES
    assert "1 objects of an unknown category, left out" in test.notes()


@pytest.mark.parametrize("lost", ["JPEGImages/001.jpg", "Annotations/001.xml", "ImageSets/Main/train.txt"])
def test_a_missing_file_is_named(tmp_path, lost):
    (write_voc(tmp_path) / lost).unlink()
    with pytest.raises(ValueError, match=Path(lost).name.replace(".", r"\.")):
        open_objects(tmp_path, "train")


def test_unknown_folders_are_told(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_objects(tmp_path / "none", "train")
    with pytest.raises(ValueError, match="possible are COCO"):
        open_objects(tmp_path, "train")


@_OF_PYCOCOTOOLS
def test_masks_are_pycocotools_masks_on_real_images(real_data):
    root = real_data / "coco128"
    if not root.is_dir():
        pytest.skip(f"needs COCO128 in {root}")
    from pycocotools.coco import COCO

    file = root / "annotations" / "instances_val2017.json"
    images = open_objects(root, "train")
    assert (len(images), len(images.classes)) == (96, 80)
    reference = COCO(str(file))
    ids = [entry["id"] for entry in json.loads(file.read_text())["images"]]
    for image, identifier in list(zip(images.images, ids, strict=False))[:12]:
        annotations = reference.loadAnns(reference.getAnnIds([identifier]))
        masks = image.masks()
        assert len(masks) == len(annotations)
        for mask, annotation in zip(masks, annotations, strict=True):
            assert np.array_equal(mask.numpy(), reference.annToMask(annotation))
        assert image.image().shape[1:] == (image.height, image.width)


def test_blood_cells_are_read(real_data):
    root = real_data / "bccd"
    if not root.is_dir():
        pytest.skip(f"needs BCCD in {root}")
    train, test = open_objects(root, "train"), open_objects(root, "test")
    assert (len(train), len(test)) == (292, 72)
    assert train.classes == test.classes == ("Platelets", "RBC", "WBC")
    assert not {image.source for image in train.images} & {image.source for image in test.images}
    for image in test.images:
        assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()
        assert (image.boxes <= torch.tensor([640, 480, 640, 480])).all()
    assert test.images[0].image().shape == (3, 480, 640)
