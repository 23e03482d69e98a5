"""Folders of domains: layouts detected, split as published, mistakes named in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchless.data import open_domains


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


def write_tree(root: Path, domains: dict[str, dict[str, int]]) -> Path:
    """`root/<domain>/<class>/<number>.png` with so many images of each class, of different grey."""
    for number, (domain, classes) in enumerate(domains.items()):
        for label, (name, count) in enumerate(classes.items()):
            for index in range(count):
                write_image(root / domain / name / f"{index:03}.png", 100 * number + 30 * label + index)
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path, {"art": {"cat": 10, "dog": 20}, "photo": {"cat": 15, "dog": 5}})


def sources(images) -> set[str]:
    return {images.source(index) for index in range(len(images))}


def labels(images) -> list[int]:
    return [images.label(index) for index in range(len(images))]


def test_a_tree_is_split_by_domain_and_class(tree):
    train, test = open_domains(tree, "train"), open_domains(tree, "test")
    assert list(train) == list(test) == ["art", "photo"]
    assert {name: (len(train[name]), len(test[name])) for name in train} == {"art": (24, 6), "photo": (16, 4)}
    for name, counts in {"art": [2, 4], "photo": [3, 1]}.items():
        assert not sources(train[name]) & sources(test[name])
        assert sources(train[name]) | sources(test[name]) == {str(path) for path in (tree / name).glob("*/*.png")}
        assert [labels(test[name]).count(label) for label in (0, 1)] == counts
        assert train[name].classes == ("cat", "dog")
    image = test["photo"]
    for index in range(len(image)):
        folder, file = Path(image.source(index)).parts[-2:]
        assert image.label(index) == ("cat", "dog").index(folder)
        assert int(image.image(index)[0, 0, 0]) == 100 + 30 * image.label(index) + int(file.removesuffix(".png"))


def test_the_split_is_that_of_scikit_learn_in_its_order(tree):
    from sklearn.model_selection import StratifiedShuffleSplit

    files = [str(path) for name in ("cat", "dog") for path in sorted((tree / "art" / name).iterdir())]
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=0.3, random_state=5)
    expected, _ = next(splitter.split(files, [Path(file).parent.name for file in files]))
    train = open_domains(tree, "train", test_share=0.3, seed=5)["art"]
    assert [train.source(index) for index in range(len(train))] == [files[index] for index in expected]
    assert [train.source(index) for index in range(21)] != sorted(sources(train))


def test_domains_and_classes_can_be_chosen_in_any_order(tree):
    chosen = open_domains(tree, "test", domains=["photo", "art"], classes=["dog"])
    assert list(chosen) == ["photo", "art"]
    assert {name: (images.classes, set(labels(images)), len(images)) for name, images in chosen.items()} == {
        "photo": (("dog",), {0}, 1),
        "art": (("dog",), {0}, 4),
    }
    turned = open_domains(tree, "train", classes=["dog", "cat"])["art"]
    assert all(("dog", "cat")[turned.label(i)] == Path(turned.source(i)).parent.name for i in range(len(turned)))
    assert turned.image(0).shape == (3, 4, 4)


def test_one_unlike_domain_can_be_left_out_by_choice(tree):
    write_tree(tree, {"sketch": {"cat": 5, "wolf": 5}})
    with pytest.raises(
        ValueError, match=r"class 'dog' is in 'art', 'photo' but not in 'sketch': all domains need"
    ) as error:
        open_domains(tree, "train")
    assert "\n" not in str(error.value)
    assert list(open_domains(tree, "train", domains=["art", "photo"])) == ["art", "photo"]
    assert list(open_domains(tree, "train", classes=["cat"])) == ["art", "photo", "sketch"]


def test_a_domain_with_a_split_of_its_own_keeps_it(tmp_path):
    for domain in ("art", "photo"):
        write_tree(tmp_path / domain, {"train": {"cat": 3, "dog": 4}, "val": {"cat": 2, "dog": 1}})
    assert {name: len(images) for name, images in open_domains(tmp_path, "train").items()} == {"art": 7, "photo": 7}
    test = open_domains(tmp_path, "test")["photo"]
    assert sources(test) == {str(path) for path in (tmp_path / "photo" / "val").glob("*/*.png")}


def test_one_ordinary_dataset_is_one_domain(tmp_path):
    root = write_tree(tmp_path / "pets", {"train": {"cat": 3, "dog": 4}, "test": {"cat": 2, "dog": 1}})
    domains = open_domains(root, "train")
    assert {name: len(images) for name, images in domains.items()} == {"pets": 7}


def test_hidden_files_and_folders_are_no_domains_and_no_classes(tree):
    write_image(tree / ".cache" / "x" / "0.png", 0)
    write_image(tree / "art" / ".thumbs" / "0.png", 0)
    (tree / "readme.txt").write_text("about")
    (tree / "empty").mkdir()
    assert list(open_domains(tree, "train")) == ["art", "photo"]


def test_the_embedded_domains_are_the_default():
    domains = open_domains(None, "test", domains=["fonts", "plain"], classes=["3", "8"])
    assert list(domains) == ["fonts", "plain"]
    assert {images.classes for images in domains.values()} == {("3", "8")}
    with pytest.raises(
        ValueError, match="domain 'mnist': there is none of that name in the embedded digits, there are pla"
    ):
        open_domains(None, "test", domains=["mnist"])


def test_an_empty_class_is_named(tree):
    (tree / "photo" / "dog" / "000.png").rename(tree / "kept.png")
    for path in (tree / "photo" / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"photo/dog: no image in this class folder .* leave the class out"):
        open_domains(tree, "train")


def test_a_class_of_one_image_is_named(tree):
    for path in sorted((tree / "photo" / "dog").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"domain 'photo': class 'dog' has 1 image, a split .* needs 2"):
        open_domains(tree, "train")


def test_a_domain_too_small_for_the_share_is_named(tree):
    with pytest.raises(
        ValueError, match=r"domain 'art': 30 images cannot be split with test_share=0.01 \(.*\): add"
    ) as error:
        open_domains(tree, "train", test_share=0.01)
    assert "\n" not in str(error.value)


def test_an_unreadable_image_is_named_when_it_is_asked_for(tree):
    for path in (tree / "art" / "cat").iterdir():
        path.write_bytes(b"no image")
    images = open_domains(tree, "train")["art"]
    with pytest.raises(ValueError, match=r"art/cat/\d+.png: cannot be read as an image"):
        images.image(labels(images).index(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, "split='validation': there are 'train' and 'test'"),
        ({"test_share": 0.0}, "test_share=0.0: give a share"),
        ({"test_share": 1.0}, "test_share=1.0: give a share"),
        ({"domains": ["art", "clipart"]}, r"domain 'clipart': there is none of that name in .*, there are art, photo"),
        ({"domains": ["art", "art"]}, r"domains=\['art', 'art'\]: name one or more, each once"),
        ({"domains": []}, r"domains=\[\]: name one or more"),
        ({"classes": ["cat", "cat"]}, r"classes=\['cat', 'cat'\]: name one or more, each once"),
        ({"classes": ["cat", "cow"]}, "domain 'art' has no class 'cow', it has cat, dog"),
    ],
)
def test_wrong_settings_are_named(tree, settings, message):
    with pytest.raises(ValueError, match=message):
        open_domains(tree, **({"split": "train"} | settings))


def test_a_folder_in_no_layout_is_refused_with_what_is_possible(tmp_path):
    for root, what in ((tmp_path / "absent", "does not exist"), (tmp_path, "holds no known layout of domains")):
        with pytest.raises(ValueError, match=rf"{what}.*<domain>/<class>.*DomainNet.*Digits-Five.*npz.*ISIC"):
            open_domains(root, "train")
    write_image(tmp_path / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match="holds no known layout of domains"):
        open_domains(tmp_path, "train")
    with pytest.raises(ValueError, match="is not a folder"):
        open_domains(tmp_path / "cat" / "0.png", "train")


def test_nothing_random_is_read_or_changed(tree):
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = open_domains(tree, "train")["art"].indices
    assert open_domains(str(tree), "train")["art"].indices == first
    assert (np.random.get_state()[1] == np_state).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_office_caltech_10_has_the_published_test_sizes(real_data):
    root = real_data / "office_caltech_10"
    if not root.is_dir():
        pytest.skip(f"needs Office-Caltech-10 in {root}")
    for seed in (0, 1):
        sizes = {name: len(images) for name, images in open_domains(root, "test", seed=seed).items()}
        assert sizes == {"amazon": 192, "caltech": 225, "dslr": 32, "webcam": 59}
    sizes = {name: len(images) for name, images in open_domains(root, "train").items()}
    assert sizes == {"amazon": 766, "caltech": 898, "dslr": 125, "webcam": 236}


def test_cifar10_is_one_domain(real_data):
    if not (real_data / "cifar10").is_dir():
        pytest.skip(f"needs CIFAR-10 in {real_data / 'cifar10'}")
    assert {name: len(images) for name, images in open_domains(real_data / "cifar10", "test").items()} == {
        "cifar10": 10000
    }
