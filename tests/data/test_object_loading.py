from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from object_files import write_coco

from batchless.data import epoch_order
from batchless.data.object_loading import (
    ObjectAugment,
    augmented_objects,
    grouped_order,
    object_batches,
    resized_size,
)
from batchless.data.objects import boxes_of
from batchless.data.open_objects import open_objects
from batchless.data.scattered_digits import scattered_digits


@st.composite
def scenes(draw):
    """An image of 20 to 60 pixels with one to three rectangular objects of 6 pixels or more, exactly their masks."""
    height, width = draw(st.integers(20, 60)), draw(st.integers(20, 60))
    masks = torch.zeros(draw(st.integers(1, 3)), height, width, dtype=torch.uint8)
    for mask in masks:
        top, left = draw(st.integers(0, height - 6)), draw(st.integers(0, width - 6))
        mask[top : draw(st.integers(top + 6, height)), left : draw(st.integers(left + 6, width))] = 1
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0], image[1] = 255 * masks.amax(0), 255 * masks[0]
    return image, masks


@given(
    scene=scenes(),
    sides=st.lists(st.integers(16, 90), min_size=1, max_size=3),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_boxes_masks_and_pixels_stay_together(scene, sides, flip, seed):
    image, masks = scene
    augment = ObjectAugment(shorter_sides=tuple(sides), longest_side=120, flip=flip)
    moved, boxes, moved_masks = augmented_objects(image, boxes_of(masks), masks, augment=augment, rng=Random(seed))
    height, width = moved.shape[1:]
    assert moved_masks.shape == (len(masks), height, width)
    assert (boxes[:, :2] >= -1e-4).all()
    assert (boxes <= torch.tensor([width, height, width, height]) + 1e-4).all()
    # The mask is resized by its nearest pixels: its box is the transformed box up to one pixel on each side.
    assert (boxes_of(moved_masks) - boxes).abs().max() <= 1
    # Where two masks agree with the blurred image that shows them.
    shown, covered = moved[0] > 127, moved_masks.amax(0).bool()
    assert (shown != covered).sum() <= 2.1 * (height + width) * len(masks) * max(1, height / image.shape[1])
    if augment.flip and Random(seed).random() < 0.5:
        unflipped = ObjectAugment(shorter_sides=tuple(sides), longest_side=120, flip=False)
        rng = Random(seed)
        rng.random()
        straight, _, straight_masks = augmented_objects(image, boxes_of(masks), masks, augment=unflipped, rng=rng)
        assert torch.equal(moved, straight.flip(-1))
        assert torch.equal(moved_masks, straight_masks.flip(-1))


@given(st.integers(20, 500), st.integers(20, 500), st.integers(100, 900), st.integers(0, 600))
def test_sizes_keep_the_ratio_and_the_limits(height, width, shorter_side, more):
    new = resized_size(height, width, shorter_side=shorter_side, longest_side=shorter_side + more)
    assert max(new) <= shorter_side + more
    assert min(new) <= shorter_side
    assert max(new) == shorter_side + more or min(new) == shorter_side
    assert new[0] / height == pytest.approx(new[1] / width, abs=0.51 / min(height, width) + 0.51 / max(height, width))


def test_an_image_of_the_size_asked_for_is_left_as_it_is():
    image = torch.randint(256, (3, 30, 40), dtype=torch.uint8)
    moved, boxes, masks = augmented_objects(
        image,
        torch.zeros(0, 4),
        None,
        augment=ObjectAugment(shorter_sides=(30,), longest_side=40, flip=False),
        rng=Random(0),
    )
    assert torch.equal(moved, image)
    assert boxes.shape == (0, 4)
    assert masks is None


@given(
    wide=st.lists(st.booleans(), min_size=1, max_size=40),
    size=st.integers(1, 5),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
)
def test_every_forward_but_the_last_has_one_orientation(wide, size, seed, epoch):
    order = grouped_order(wide, images_per_forward=size, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(len(wide)))
    assert order == grouped_order(wide, images_per_forward=size, seed=seed, epoch=epoch)
    pieces = [order[at : at + size] for at in range(0, len(order), size)]
    mixed = [piece for piece in pieces if len({wide[index] for index in piece}) > 1]
    assert len(mixed) <= 1
    left = [sum(flags) % size for flags in (wide, [not flag for flag in wide])]
    begin = len(order) - sum(left)
    assert all(piece not in mixed for piece in pieces[: begin // size])
    if size == 1:
        assert order == epoch_order(len(wide), seed=seed, epoch=epoch)


@pytest.fixture(scope="module")
def digits():
    return scattered_digits("train", count=12)


def samples(digits, plan, **changes):
    settings = {"seed": 1, "epoch": 2, "masks": True, "augment": ObjectAugment(shorter_sides=(48, 64, 80)), **changes}
    return list(object_batches(digits, plan, **settings))


def _same(one, other):
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.boxes, other.boxes)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.masks, other.masks)
        and one.index == other.index
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_depends_on_seed_epoch_and_index_alone(digits, workers):
    alone = samples(digits, [[index] for index in range(12)])
    together = samples(digits, [[3, 7, 1], [11, 0]], workers=workers)
    assert [len(batch) for batch in together] == [3, 2]
    for sample in (sample for batch in together for sample in batch):
        assert _same(sample, alone[sample.index][0])
    sizes = {tuple(batch[0].image.shape) for batch in alone}
    assert sizes == {(3, 48, 48), (3, 64, 64), (3, 80, 80)}
    other = samples(digits, [[index] for index in range(12)], epoch=3)
    assert any(one[0].image.shape != two[0].image.shape for one, two in zip(alone, other, strict=True))


def test_evaluation_gives_images_as_they_are_and_what_is_known(digits):
    for index, (sample,) in enumerate(samples(digits, [[index] for index in range(12)], augment=None)):
        assert torch.equal((sample.image * 255).round(), digits.images[index].image().float())
        assert sample.known is not None
        assert torch.equal(sample.known.boxes, digits.images[index].boxes)
        assert sample.masks is None


def test_the_global_random_state_is_left_alone(digits):
    before = torch.get_rng_state()
    samples(digits, [[0], [1]])
    scattered_digits("test", count=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path, workers):
    root = write_coco(tmp_path)
    (root / "val2017" / "001.jpg").write_bytes(b"nothing")
    images = open_objects(root, "test")
    with pytest.raises(ValueError, match=r"001\.jpg: cannot be read as an image"):
        samples(images, [[0], [1]], workers=workers)


def test_crowds_are_not_learned(tmp_path):
    def change(content):
        content["annotations"][0]["iscrowd"] = 1

    images = open_objects(write_coco(tmp_path, change=change), "test")
    ((sample,),) = samples(images, [[0]])
    assert len(sample.labels) == len(sample.boxes) == len(sample.masks) == 1
    ((sample,),) = samples(images, [[0]], augment=None)
    assert sample.known.crowd.tolist() == [True, False]


@pytest.mark.parametrize("wrong", [{"shorter_sides": ()}, {"shorter_sides": (0,)}, {"longest_side": 10}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ObjectAugment(**wrong)
