from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from batchless.data import IMAGENET_STATISTICS, Augment, ChannelStatistics, Subset, channel_statistics, open_images
from batchless.data.augment import augmented, centred, erased_part
from batchless.data.memory import TensorImages
from batchless.data.statistics import normalized

sizes = st.integers(1, 24)


def numbered(height: int, width: int) -> torch.Tensor:
    """An image in which every pixel has another value."""
    return torch.arange(height * width).reshape(height, width).to(torch.uint8).expand(3, -1, -1)


def photo(height: int, width: int) -> torch.Tensor:
    """A coloured image, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def view(image, size, *, seed=0, **settings):
    return augmented(image, size, augment=Augment(**settings), rng=Random(seed))


def is_part(small: torch.Tensor, large: torch.Tensor) -> bool:
    windows = large.unfold(1, small.shape[1], 1).unfold(2, small.shape[2], 1)
    return bool((windows == small[:, None, None]).all(dim=(0, 3, 4)).any())


def test_rotation_turns_by_an_angle_within_its_range_and_changes_nothing_else():
    image = photo(9, 9)
    expected = {seed: Random(seed).uniform(-30, 30) for seed in range(20)}
    for seed, angle in expected.items():
        turned = view(image, 9, seed=seed, crop_padding=0, flip=False, rotation=30)
        assert torch.equal(turned, v2.functional.rotate(image, angle)), seed
    assert max(expected.values()) > 20
    assert min(expected.values()) < -20
    assert torch.equal(view(image, 9, rotation=0.0), view(image, 9))
    half = view(image, 9, seed=3, crop_padding=0, flip=False, rotation=180)
    assert half.shape == image.shape
    for degrees in (-1, 181, float("nan")):
        with pytest.raises(ValueError, match=f"rotation={degrees}: give degrees from 0 to 180"):
            Augment(rotation=degrees)


@given(height=sizes, width=sizes, size=sizes, padding=st.integers(0, 4), resized=st.booleans(), seed=st.integers(0, 99))
def test_every_view_is_a_square_of_the_size(height, width, size, padding, resized, seed):
    image = numbered(height, width)
    assert centred(image, size).shape == (3, size, size)
    result = view(image, size, seed=seed, crop_padding=padding, random_resized_crop=resized)
    assert result.shape == (3, size, size)
    assert result.dtype == torch.uint8


@given(seed=st.integers(0, 999), padding=st.integers(0, 4), flip=st.booleans())
def test_pad_and_crop_cuts_a_part_out_of_the_padded_image(seed, padding, flip):
    padded = torch.nn.functional.pad(numbered(8, 8), [padding] * 4)
    result = view(numbered(8, 8), 8, seed=seed, crop_padding=padding, flip=flip)
    assert is_part(result, padded) or (flip and is_part(result.flip(2), padded))


def test_all_crops_and_both_flips_occur():
    views = {view(numbered(4, 4), 4, seed=seed, crop_padding=1).numpy().tobytes() for seed in range(400)}
    assert len(views) == 3 * 3 * 2


def test_flips_are_half_of_the_images():
    image = numbered(4, 4)
    flipped = sum(torch.equal(view(image, 4, seed=seed, crop_padding=0), image.flip(2)) for seed in range(1000))
    assert 430 < flipped < 570


def test_nothing_random_leaves_a_square_as_it_is():
    image = numbered(8, 8)
    assert torch.equal(view(image, 8, crop_padding=0, flip=False), image)
    assert torch.equal(centred(image, 8), image)
    assert torch.equal(view(image, 8, random_resized_crop=True, scale=(1, 1), ratio=(1, 1), flip=False), image)


def test_evaluation_takes_the_centre():
    assert torch.equal(centred(numbered(8, 12), 8), numbered(8, 12)[:, :, 2:10])
    assert torch.equal(centred(numbered(14, 8), 8), numbered(14, 8)[:, 3:11])
    grey = torch.full((3, 30, 50), 77, dtype=torch.uint8)
    assert torch.equal(centred(grey, 8), grey[:, :8, :8])


@given(height=st.integers(4, 40), width=st.integers(4, 40), seed=st.integers(0, 99))
def test_resized_crops_show_only_the_image(height, width, seed):
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    assert (view(image, 8, seed=seed, random_resized_crop=True) == 200).all()


def test_evaluation_can_resize_to_more_than_it_shows():
    image = photo(20, 30)
    expected = functional.center_crop(functional.resize(image, [16], antialias=True), [8, 8])
    assert torch.equal(centred(image, 8, resize_to=16), expected)
    assert torch.equal(centred(image[:, :, :20], 8, resize_to=20), image[:, 6:14, 6:14])
    # A square of the size is resized too: objects have the same size in all images.
    assert centred(image[:, :8, :8], 8, resize_to=16).shape == (3, 8, 8)
    assert not torch.equal(centred(image[:, :8, :8], 8, resize_to=16), image[:, :8, :8])


def test_rand_augment_is_torchvisions_for_the_seed_of_the_sample():
    image = photo(16, 16)
    settings = {"crop_padding": 0, "flip": False, "rand_augment": 2, "rand_augment_magnitude": 12}
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Random(seed).getrandbits(63))
            expected = v2.RandAugment(2, 12)(image)
        assert torch.equal(view(image, 16, seed=seed, **settings), expected)
    views = {view(image, 16, seed=seed, **settings).numpy().tobytes() for seed in range(40)}
    assert len(views) > 25


def test_rand_augment_leaves_torchs_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = view(photo(16, 16), 16, rand_augment=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(first, view(photo(16, 16), 16, rand_augment=3))


def test_rand_augment_does_not_reseed_accelerators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the state of the GPUs is changed"))
    view(photo(16, 16), 16, rand_augment=2)


def test_colour_jitter_scales_brightness_contrast_and_saturation():
    image = photo(16, 16)
    settings = {"crop_padding": 0, "flip": False, "color_jitter": 0.4}
    for seed in range(20):
        rng, expected = Random(seed), image
        order = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
        rng.shuffle(order)
        for adjust in order:
            factor = rng.uniform(0.6, 1.4)
            assert 0.6 <= factor <= 1.4
            expected = adjust(expected, factor)
        assert torch.equal(view(image, 16, seed=seed, **settings), expected)
    # Of a grey image of one value, only the brightness can change.
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [view(grey, 4, seed=seed, **settings).unique() for seed in range(200)]
    assert all(len(value) == 1 for value in values)
    assert 58 <= min(values) < 66
    assert 134 < max(values) <= 141


def test_colours_change_after_the_crop():
    """What is added to the settings leaves crops and flips as they are."""
    image = photo(16, 16)
    for seed in range(10):
        cropped = view(image, 16, seed=seed)
        black = (cropped == 0).all(dim=0)
        assert (view(image, 16, seed=seed, color_jitter=0.2)[:, black] <= 60).all()
        rng = Random(seed)
        augmented(image, 16, augment=Augment(), rng=rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(63))
            assert torch.equal(view(image, 16, seed=seed, rand_augment=1), v2.RandAugment(1, 9)(cropped))


def test_erased_parts_have_a_third_of_the_area_at_most():
    parts = [erased_part(32, augment=Augment(erasing=1), rng=Random(seed)) for seed in range(2000)]
    for top, left, height, width in parts:
        assert 0 <= top <= top + height <= 32
        assert 0 <= left <= left + width <= 32
        assert 0.01 < height * width / 32**2 < 0.35
        assert 0.25 < width / height < 4
    # Uniform from 0.02 to 0.33, but for the largest and narrowest ones, which do not fit.
    assert 0.16 < sum(height * width for _, _, height, width in parts) / 2000 / 32**2 < 0.18
    assert (
        440
        < sum(erased_part(32, augment=Augment(erasing=0.25), rng=Random(seed)) is not None for seed in range(2000))
        < 560
    )


def test_the_input_is_not_written_to():
    image = photo(16, 16)
    for seed in range(30):
        for settings in (
            {},
            {"random_resized_crop": True},
            {"crop_padding": 0, "rand_augment": 3, "color_jitter": 0.5},
        ):
            view(image, 16, seed=seed, **settings)
    assert torch.equal(image, photo(16, 16))
    view(image, 16, random_resized_crop=True).fill_(0)
    assert torch.equal(image, photo(16, 16))


@given(seed=st.integers(0, 999), magnitude=st.integers(0, 30), grey=st.booleans())
def test_every_operation_keeps_size_and_type(seed, magnitude, grey):
    image = photo(16, 16)[:1].expand(3, -1, -1) if grey else photo(16, 16)
    result = view(image, 16, seed=seed, rand_augment=2, rand_augment_magnitude=magnitude, color_jitter=1)
    assert result.shape == (3, 16, 16)
    assert result.dtype == torch.uint8


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"crop_padding": -1}, "crop_padding"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.4)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"rand_augment": -1}, "rand_augment"),
        ({"rand_augment_magnitude": 31}, "rand_augment_magnitude"),
        ({"color_jitter": 1.5}, "color_jitter"),
        ({"erasing": -0.1}, "erasing"),
        ({"erasing": float("nan")}, "erasing"),
    ],
)
def test_settings_are_checked(settings, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        Augment(**settings)


def test_normalization_has_the_bits_of_torchvisions():
    images = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    expected = functional.to_dtype(images, torch.float32, scale=True)
    expected = functional.normalize(expected, list(IMAGENET_STATISTICS.mean), list(IMAGENET_STATISTICS.std))
    assert torch.equal(normalized(images, IMAGENET_STATISTICS), expected)


def test_statistics_normalize_what_they_were_computed_from():
    images = open_images(None, "test")
    values = normalized(images.images, channel_statistics(images)).double()
    torch.testing.assert_close(values.mean(dim=(0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        values.std(dim=(0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_statistics_take_a_seeded_choice():
    images = open_images(None, "test")
    assert channel_statistics(images, limit=50) == channel_statistics(images, limit=50)
    assert channel_statistics(images, limit=50) != channel_statistics(images, limit=50, seed=1)
    turned = Subset(dataset=images, indices=tuple(reversed(range(len(images)))))
    assert channel_statistics(images) == channel_statistics(turned)


def test_constant_images_have_no_statistics():
    black = TensorImages(images=torch.zeros(2, 1, 4, 4).byte(), labels=(0, 0), classes=("a",), origins=(("black", 2),))
    with pytest.raises(ValueError, match="2 images from black 0 on: a channel has the same value everywhere"):
        channel_statistics(black)
    with pytest.raises(ValueError, match="limit=0"):
        channel_statistics(black, limit=0)


@pytest.mark.parametrize(
    ("mean", "std"), [((0, 0), (1, 1, 1)), ((0, 0, 0), (1, 0, 1)), ((0, float("nan"), 0), (1, 1, 1))]
)
def test_statistics_are_checked(mean, std):
    with pytest.raises(ValueError, match=r"mean=.*std="):
        ChannelStatistics(mean=mean, std=std)
    assert len(IMAGENET_STATISTICS.mean) == 3
