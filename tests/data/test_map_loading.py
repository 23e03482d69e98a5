from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchless.data import IMAGENET_STATISTICS
from batchless.data.label_maps import IGNORED, LabelMaps
from batchless.data.map_loading import MapAugment, augmented_map, map_batches
from batchless.data.open_label_maps import open_label_maps
from batchless.data.statistics import normalized
from small_maps import scene, write_folders


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> LabelMaps:
    return open_label_maps(write_folders(tmp_path_factory.mktemp("maps")), "train")


def batches(images, micro_batches, *, epoch=0, training=True, workers=0, **augment):
    return list(
        map_batches(
            images,
            micro_batches,
            seed=0,
            epoch=epoch,
            augment=MapAugment(**augment),
            training=training,
            mean_std=IMAGENET_STATISTICS,
            workers=workers,
        )
    )


@st.composite
def scenes(draw):
    """Labels of 20 to 60 pixels a side in rectangles, and an image whose pixels are 80 times their labels."""
    height, width = draw(st.integers(20, 60)), draw(st.integers(20, 60))
    labels = torch.zeros(height, width, dtype=torch.uint8)
    for label in (1, 2, 3):
        top, left = draw(st.integers(0, height - 6)), draw(st.integers(0, width - 6))
        labels[top : draw(st.integers(top + 6, height)), left : draw(st.integers(left + 6, width))] = label
    return (80 * labels).expand(3, -1, -1).contiguous(), labels


@given(
    scene=scenes(),
    crop=st.none() | st.tuples(st.integers(4, 80), st.integers(4, 80)),
    side=st.none() | st.integers(16, 90),
    scales=st.sampled_from([(1.0, 1.0), (0.5, 2.0)]),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_image_and_map_stay_together(scene, crop, side, scales, flip, seed):
    augment = MapAugment(shorter_side=side, scales=scales, crop=crop, flip=flip)
    image, labels = augmented_map(*scene, augment=augment, rng=Random(seed))
    assert image.shape[1:] == labels.shape
    if crop is not None:
        assert all(length <= limit for length, limit in zip(labels.shape, crop, strict=True))
    wrong = (image[0].float() - 80 * labels.float()).abs() > 60
    if side is None and scales == (1.0, 1.0):
        assert torch.equal(image[0], 80 * labels)
        return
    # Resized, they may differ within the width of a filter about edges: nowhere in the middle of an area of one label.
    reach = 5
    padded = torch.nn.functional.pad(labels.float()[None, None], [reach] * 4, mode="replicate")
    largest = torch.nn.functional.max_pool2d(padded, 2 * reach + 1, 1)[0, 0]
    smallest = -torch.nn.functional.max_pool2d(-padded, 2 * reach + 1, 1)[0, 0]
    assert not wrong[largest == smallest].any()
    assert wrong.float().mean() <= 0.5


def test_the_transformed_map_is_the_map_of_the_transformed_image(images):
    """By another way: the labels drawn as an image, and the nearest label of each pixel of the augmented image."""
    for index in range(8):
        stored = images.sample(index)[1]
        drawn = torch.where(stored == IGNORED, 240, 80 * stored).expand(3, -1, -1).contiguous()
        augment = MapAugment(scales=(1.5, 2.0), crop=(30, 40), flip=True)
        image, labels = augmented_map(drawn, stored, augment=augment, rng=Random(index))
        read = torch.where(image[0] > 200, IGNORED, ((image[0].float() + 40) // 80).to(torch.uint8))
        assert (read == labels).float().mean() > 0.9


def test_a_flip_is_a_flip_and_scales_are_uniform_in_their_logarithm():
    image, labels = (torch.from_numpy(part) for part in scene(0))
    image = image.permute(2, 0, 1)
    straight, mirrored = (
        [augmented_map(image, labels, augment=MapAugment(crop=(9, 9), flip=flip), rng=Random(s)) for s in range(40)]
        for flip in (False, True)
    )
    flips = 0
    for (one, own), (other, theirs) in zip(straight, mirrored, strict=True):
        if torch.equal(own, theirs) and torch.equal(one, other):
            continue
        flips += 1
        assert torch.equal(one.flip(-1), other)
        assert torch.equal(own.flip(-1), theirs)
    assert 10 <= flips <= 30
    augment = MapAugment(scales=(0.5, 2.0))
    heights = [augmented_map(image, labels, augment=augment, rng=Random(s))[1].shape[0] for s in range(200)]
    assert min(heights) >= 12
    assert max(heights) <= 48
    assert 70 <= sum(height < 24 for height in heights) <= 130  # half of them below 1


def test_padding_is_the_mean_colour_and_ignored(images):
    [batch] = batches(images, [[0]], crop=(40, 50))
    image, labels = images.sample(0)
    assert batch.images.shape == (1, 3, 40, 50)
    assert torch.equal(batch.images[0, :, :24, :32], normalized(image, IMAGENET_STATISTICS))
    assert torch.equal(batch.labels[0, :24, :32], labels)
    assert not batch.images[0, :, 24:].any()
    assert not batch.images[0, :, :, 32:].any()
    assert (batch.labels[0, 24:] == IGNORED).all()
    assert (batch.labels[0, :, 32:] == IGNORED).all()


def test_a_sample_is_a_function_of_seed_epoch_and_index(images):
    augment = {"scales": (0.5, 2.0), "crop": (16, 16), "flip": True}
    one = batches(images, [[3, 1], [2]], **augment)
    other = batches(images, [[2, 3]], **augment)
    assert torch.equal(one[0].images[0], other[0].images[1])
    assert torch.equal(one[1].labels[0], other[0].labels[0])
    assert one[0].indices.tolist() == [3, 1]
    assert not torch.equal(batches(images, [[3]], epoch=1, **augment)[0].images, one[0].images[:1])
    [in_worker] = batches(images, [[3, 1]], workers=1, **augment)
    assert torch.equal(in_worker.images, one[0].images)


def test_evaluation_sees_whole_images_and_keeps_the_maps_own_size(images):
    [batch] = batches(images, [[0]], training=False, shorter_side=12, crop=(8, 8), scales=(0.5, 2.0), flip=True)
    assert (batch.images.shape, batch.labels.shape) == ((1, 3, 12, 16), (1, 24, 32))
    assert torch.equal(batch.labels[0], images.sample(0)[1])


def test_what_does_not_fit_a_batch_names_the_setting(images, tmp_path):
    other = open_label_maps(write_folders(tmp_path), "train")
    from small_maps import save_image, save_map

    image, labels = scene(0, height=30)
    save_image(image, tmp_path / "train" / "images" / "000.png")
    save_map(labels, tmp_path / "train" / "labels" / "000.png")
    with pytest.raises(ValueError, match=r"32x24 and 32x30 pixels: set segment\.crop, or images_per_forward=1"):
        batches(other, [[0, 1]])
    with pytest.raises(ValueError, match="out of range"):
        batches(images, [[8]])
    for name, value, message in (
        ("scales", (0.0, 1.0), r"scales=\[0\.0, 1\.0\]: give two factors"),
        ("crop", (0, 4), r"crop=\[0, 4\]: give height and width"),
        ("shorter_side", 0, "shorter_side=0: give 1 pixel or more"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(MapAugment(), **{name: value})
