import pytest
import torch
from sklearn.datasets import load_digits

from batchless.data.handwriting import digit_instances, handwriting


@pytest.fixture(scope="module")
def splits():
    return {split: handwriting(split) for split in ("train", "test")}


def test_sizes_and_types(splits):
    assert {split: len(images) for split, images in splits.items()} == {"train": 5748, "test": 1080}
    for split, images in splits.items():
        assert images.classes == tuple("0123456789")
        assert images.image(5).dtype == torch.uint8
        assert images.image(5).shape == (3, 32, 32)
        assert images.source(5) == f"handwriting {split} 5"


def test_the_splits_share_no_digit_and_lose_none():
    train, test = (
        {tuple(digit.flatten().tolist()) for digit in digit_instances(split)[0]} for split in ("train", "test")
    )
    assert not train & test
    assert train | test == {tuple(digit) for digit in (load_digits().data / 16).tolist()}


def test_the_splits_are_stratified():
    counts = [digit_instances(split)[1].bincount() for split in ("train", "test")]
    share = counts[1] / (counts[0] + counts[1])
    assert ((share - 0.2).abs() < 0.005).all()


def test_labels_are_those_of_the_digits(splits):
    known = {
        tuple(digit): int(label) for digit, label in zip(load_digits().data / 16, load_digits().target, strict=True)
    }
    for split, images in splits.items():
        digits, labels = digit_instances(split)
        assert [known[tuple(digit.flatten().tolist())] for digit in digits] == labels.tolist()
        assert list(images.labels) == labels.tolist() * (len(images) // len(digits))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_depends_on_split_and_index_alone(splits, split):
    fewer, more = handwriting(split, copies=1), splits[split]
    assert torch.equal(fewer.images, more.images[: len(fewer)])
    assert fewer.labels == more.labels[: len(fewer)]


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    handwriting("test", copies=1)
    assert torch.equal(before, torch.get_rng_state())


def test_copies_of_a_digit_differ(splits):
    copies = splits["test"].images.reshape(3, 360, -1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (copies[one] != copies[other]).any(dim=1).all()


def test_digits_are_lighter_than_their_surroundings(splits):
    """Readable: the border, where ink is rare, is darker than the brightest twentieth of the image, in every image."""
    grey = splits["test"].images.float().mean(dim=1)
    border = torch.cat([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], dim=1).median(dim=1).values
    assert (grey.flatten(1).quantile(0.95, dim=1) - border > 40).all()


def test_raw_pixels_are_no_good_features(splits):
    """Not trivial: the nearest of the ten class means is right for less than half of the test images."""
    train, test = (splits[split].images.flatten(1).float() for split in ("train", "test"))
    labels = torch.tensor(splits["train"].labels)
    means = torch.stack([train[labels == label].mean(dim=0) for label in range(10)])
    right = torch.cdist(test, means).argmin(dim=1) == torch.tensor(splits["test"].labels)
    assert 0.1 < right.float().mean() < 0.5


def test_at_least_one_copy():
    with pytest.raises(ValueError, match="copies=0"):
        handwriting("test", copies=0)
