"""The five embedded domains: no digit and no photo on both sides, the right labels, unlike each other and learnable."""

import pytest
import torch

from batchless.data import digit_domains
from batchless.data.digit_domains import DIGIT_DOMAINS, HANDWRITTEN, domain_instances
from batchless.data.digit_drawing import blurred, placed, printed_digits, slope
from batchless.data.handwriting import digit_instances


@pytest.fixture(scope="module")
def splits():
    return {split: digit_domains(split) for split in ("train", "test")}


def test_sizes_and_types(splits):
    for split, domains in splits.items():
        assert tuple(domains) == DIGIT_DOMAINS
        for name, images in domains.items():
            assert images.classes == tuple("0123456789")
            assert images.image(5).dtype == torch.uint8
            assert images.image(5).shape == (3, 32, 32)
            assert images.source(5) == f"digits {name} {split} 5"
            counts = torch.tensor(images.labels).bincount()
            assert counts.min() > 0.9 * counts.float().mean()


def test_no_digit_is_in_the_training_images_of_one_domain_and_the_test_images_of_any():
    """By the pixels of the digits themselves, not by their positions."""
    pixels = {
        (name, split): {
            tuple(digit.flatten().tolist()) for digit in digit_instances(split)[0][domain_instances(name, split)]
        }
        for name in HANDWRITTEN
        for split in ("train", "test")
    }
    for one in HANDWRITTEN:
        for other in HANDWRITTEN:
            assert not pixels[one, "train"] & pixels[other, "test"]
            if one != other:
                assert not pixels[one, "train"] & pixels[other, "train"]
    assert sum(len(pixels[name, "train"]) for name in HANDWRITTEN) == len(digit_instances("train")[0])


def test_labels_are_those_of_the_digits(splits):
    for split, domains in splits.items():
        labels = digit_instances(split)[1]
        for name in HANDWRITTEN:
            own = labels[domain_instances(name, split)]
            assert domains[name].labels == tuple(own.tolist()) * (len(domains[name]) // len(own))


def test_images_show_the_digits_of_their_instances(splits):
    """Plain images, shrunk again, are nearest to their own digit, of all digits of the split."""
    digits, _ = digit_instances("test")
    images = splits["test"]["plain"].images[:360].float()
    shrunk = torch.nn.functional.interpolate(images[:, :, 5:27, 5:27], size=8, mode="area").flatten(1)
    similar = torch.nn.functional.normalize(shrunk) @ torch.nn.functional.normalize(digits.flatten(1)).T
    rank = (similar > similar.diagonal()[:, None]).sum(dim=1)
    assert (rank < 20).float().mean() > 0.8


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_depends_on_domain_split_and_index_alone(splits, split):
    for name, fewer in digit_domains(split, copies=1).items():
        more = splits[split][name]
        assert torch.equal(fewer.images, more.images[: len(fewer)])
        assert fewer.labels == more.labels[: len(fewer)]


def test_the_splits_and_the_copies_are_drawn_apart(splits):
    for name in DIGIT_DOMAINS:
        train, test = splits["train"][name].images, splits["test"][name].images
        assert not torch.equal(train[:10], test[:10])
        assert (test[:360] != test[360:]).flatten(1).any(dim=1).all()


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    digit_domains("test", copies=1)
    assert torch.equal(before, torch.get_rng_state())


def test_photos_are_inverted_where_the_ink_is(splits):
    """Where ink is full, `|photo - 255|`: images of light photos are dark there and the other way round."""
    images = splits["test"]["photos"].images.float().mean(dim=1)
    border = torch.cat([images[:, :2].flatten(1), images[:, -2:].flatten(1)], dim=1).mean(dim=1)
    centre = images[:, 8:24, 8:24].flatten(1)
    light = border > 180
    assert light.sum() > 20
    assert (centre[light].quantile(0.2, dim=1) < border[light]).float().mean() > 0.9
    dark = border < 60
    assert (centre[dark].quantile(0.8, dim=1) > border[dark]).float().mean() > 0.9


def test_scans_have_a_quarter_of_the_pixels(splits):
    images = splits["test"]["scanner"].images
    assert torch.equal(images[:, :, ::2, ::2], images[:, :, 1::2, 1::2])
    assert images.shape[1] == 1


def test_domains_differ_in_their_statistics(splits):
    """What makes averaged batch statistics fail: no two domains have about the same mean and deviation."""
    statistics = torch.tensor(
        [[images.images.float().mean(), images.images.float().std()] for images in splits["train"].values()]
    )
    assert torch.pdist(statistics).min() > 8


def test_one_class_is_unlike_another_and_the_font_is_readable():
    glyphs = printed_digits()
    assert glyphs.shape == (3, 10, 32, 32)
    assert (glyphs.flatten(2).mean(dim=2) > 0.03).all()
    assert torch.pdist(glyphs.flatten(0, 1).flatten(1)).min() > 1
    inner = torch.zeros(32, 32, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    assert (glyphs[..., ~inner] < 0.5).all()


def test_a_linear_classifier_learns_a_domain_and_not_its_neighbour(splits):
    """Ridge regression on pixels: right on its own domain far above chance, on an unlike one not."""

    def features(images):
        pixels = torch.stack([images.image(i) for i in range(len(images))]).float().mean(dim=1).flatten(1) / 255
        return torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)

    def targets(images):
        return torch.tensor(images.labels)

    train, test = features(splits["train"]["plain"]), splits["test"]
    goal = torch.nn.functional.one_hot(targets(splits["train"]["plain"])).float()
    weight = torch.linalg.solve(train.T @ train + 10 * torch.eye(train.shape[1]), train.T @ goal)
    right = {name: ((features(d) @ weight).argmax(dim=1) == targets(d)).float().mean() for name, d in test.items()}
    assert right["plain"] > 0.65
    assert all(right[name] < 0.5 for name in ("photos", "street", "scanner", "fonts"))


def test_a_digit_is_drawn_at_least_once():
    with pytest.raises(ValueError, match="copies=0: each digit is drawn at least once"):
        digit_domains("test", copies=0)


def test_placing_moves_and_stretches_as_asked():
    square = torch.ones(1, 8, 8)

    def box(**changes: float) -> tuple[float, float, float, float]:
        """Centre and size in pixels, by the ink's moments, of a square of 12 x 8 pixels in the middle."""
        settings = {"height": 12.0, "width": 8.0, "x": 0.0, "y": 0.0, "turn": 0.0} | changes
        ink = placed(square, 32, **{name: torch.tensor([value]) for name, value in settings.items()})[0, 0].clamp(0, 1)
        span = torch.arange(32) - 15.5
        x, y = (ink.sum(dim=axis) @ span / ink.sum() for axis in (0, 1))
        spread = [(12 * (ink.sum(dim=axis) @ (span - mean) ** 2) / ink.sum()).sqrt() for axis, mean in ((0, x), (1, y))]
        return float(x), float(y), float(spread[0]), float(spread[1])

    assert box() == pytest.approx((0, 0, 8, 12), abs=0.6)
    assert box(x=5.0, y=-3.0) == pytest.approx((5, -3, 8, 12), abs=0.6)
    assert box(height=20.0, width=16.0) == pytest.approx((0, 0, 16, 20), abs=0.6)
    assert box(turn=torch.pi / 2) == pytest.approx((0, 0, 12, 8), abs=0.6)
    assert box(turn=torch.pi / 2, x=5.0) == pytest.approx((5, 0, 12, 8), abs=0.6)


def test_slanting_leans_the_top_to_the_side():
    ink = placed(
        torch.ones(1, 8, 8),
        32,
        height=torch.tensor([16.0]),
        width=torch.tensor([8.0]),
        x=torch.zeros(1),
        y=torch.zeros(1),
        slant=0.4,
    )[0, 0].clamp(0, 1)
    span = torch.arange(32) - 15.5
    top, bottom = (ink[row] @ span / ink[row].sum() for row in (10, 21))
    assert float(top - bottom) == pytest.approx(0.4 * 11, abs=0.3)  # over eleven rows, to the right


def test_blurring_keeps_the_sum_and_is_a_gaussian():
    image = torch.zeros(2, 3, 32, 32)
    image[:, :, 16, 16] = 1
    result = blurred(image, torch.tensor([1.0, 0.0]))
    assert result.sum(dim=(2, 3)) == pytest.approx(torch.ones(2, 3).numpy(), abs=1e-5)
    assert torch.allclose(result[1], image[1], atol=1e-6)
    assert float(result[0, 0, 16, 17] / result[0, 0, 16, 16]) == pytest.approx(0.6065, abs=1e-3)
    assert float(result[0, 0, 18, 16] / result[0, 0, 16, 16]) == pytest.approx(0.1353, abs=1e-3)


def test_a_slope_rises_towards_its_direction():
    right, down = slope(9, direction=torch.tensor([0.0, torch.pi / 2]), strength=torch.tensor([10.0, 4.0]))[:, 0]
    assert right[4].tolist() == pytest.approx([10 * value / 4 for value in range(-4, 5)])
    assert down[:, 4].tolist() == pytest.approx(list(range(-4, 5)), abs=1e-5)
