import pytest
import torch

from batchless.data.handwriting import digit_instances
from batchless.data.objects import boxes_of
from batchless.data.scattered_digits import CLASSES, SIZE, scattered_digits


@pytest.fixture(scope="module", params=["train", "test"])
def images(request):
    return scattered_digits(request.param, count=60)


def test_boxes_and_masks_are_exact(images):
    assert images.classes == CLASSES
    assert images.has_masks
    for image in images.images:
        masks = image.masks()
        assert masks.shape == (len(image), SIZE, SIZE)
        assert torch.equal(masks.flatten(1).sum(1).float(), image.areas)
        assert (masks.sum(0) <= 1).all(), "digits do not touch"
        if len(image):
            assert torch.equal(boxes_of(masks), image.boxes)


def test_the_ink_is_where_the_mask_is(images):
    """Exact masks, seen from the pixels: under a mask it is lighter than around it."""
    for image in images.images:
        grey, masks = image.image().float().mean(0), image.masks().bool()
        outside = grey[~masks.any(0)].mean() if len(masks) else 0
        for mask in masks:
            assert grey[mask].mean() > outside + 30


def test_some_images_have_no_object(images):
    counts = [len(image) for image in images.images]
    assert min(counts) == 0
    assert max(counts) > 2
    assert sum(count == 0 for count in counts) < len(counts) / 4


def test_an_image_depends_on_split_and_index_alone():
    fewer, more = scattered_digits("test", count=3), scattered_digits("test", count=5)
    for one, other in zip(fewer.images, more.images, strict=False):
        assert torch.equal(one.image(), other.image())
        assert torch.equal(one.boxes, other.boxes)
    assert not torch.equal(scattered_digits("train", count=1).images[0].image(), fewer.images[0].image())


def test_both_splits_draw_from_digits_of_their_own():
    train, test = ({tuple(d.flatten().tolist()) for d in digit_instances(split)[0]} for split in ("train", "test"))
    assert not train & test


def test_at_least_one_image():
    with pytest.raises(ValueError, match="count=0"):
        scattered_digits("test", count=0)
