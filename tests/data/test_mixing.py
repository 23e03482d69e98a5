from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from batchless.data import Augment, ChannelStatistics, Mix, batches
from batchless.data.mixing import Blend, mixed

PLAIN = ChannelStatistics(mean=(0, 0, 0), std=(1, 1, 1))
CLASSES = 7


@dataclass(frozen=True)
class Distinct:
    """Random images of 12 x 12 pixels; image i is a function of i, and so is its class."""

    length: int = 40
    classes: tuple[str, ...] = tuple("abcdefg")

    def __len__(self):
        return self.length

    def image(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 12, 12), generator=generator, dtype=torch.uint8)

    def label(self, index):
        return index % CLASSES

    def source(self, index):
        return f"distinct {index}"


def load(mix, *, length=40, indices=None, augment=None, seed=0, epoch=0):
    """Images and targets of a dataset, all at once."""
    plan = [range(length) if indices is None else indices]
    dataset = Distinct(length)
    [batch] = batches(dataset, plan, seed=seed, epoch=epoch, image_size=12, augment=augment, mean_std=PLAIN, mix=mix)
    return batch


def draws(mix, count, *, size=32):
    return [mix.draw(size, rng=Random(seed)) for seed in range(count)]


alphas = st.sampled_from([0.0, 0.2, 1.0, 4.0])


@given(mixup=alphas, cutmix=alphas, probability=st.floats(0, 1), seed=st.integers(0, 99))
def test_targets_are_probabilities(mixup, cutmix, probability, seed):
    mix = Mix(mixup=mixup, cutmix=cutmix, probability=probability)
    images, targets = load(mix, length=9, seed=seed)
    assert targets.shape == (9, CLASSES)
    assert targets.dtype == images.dtype == torch.float32
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(9), rtol=0, atol=1e-6)
    assert torch.equal(images, load(mix, length=9, seed=seed)[0])


@pytest.mark.parametrize("augment", [None, Augment(erasing=0.5)], ids=["none", "pad and crop"])
def test_mixup_is_the_convex_combination_of_two_augmented_samples(augment):
    images, targets = load(Mix(mixup=1), augment=augment)
    plain, labels = load(None, augment=augment)
    partners = []
    for index in range(40):
        # The partner and lambda, found from the pixels alone: x - p = (1 - lambda) (q - p).
        moved, others = (images[index] - plain[index]).flatten(), (plain - plain[index]).flatten(1)
        share = 1 - (others @ moved) / others.square().sum(dim=1)
        error = (moved - (1 - share[:, None]) * others).abs().amax(dim=1)
        error[index] = torch.inf
        partner = int(error.argmin())
        assert error[partner] < 1e-5
        expected = share[partner] * F.one_hot(labels[index], CLASSES)
        expected += (1 - share[partner]) * F.one_hot(labels[partner], CLASSES)
        torch.testing.assert_close(targets[index], expected, rtol=0, atol=1e-5)
        partners.append(partner)
    assert len(set(partners)) > 15


def test_cutmix_pastes_a_box_whose_share_of_the_area_is_the_partners_share_of_the_target():
    images, targets = load(Mix(cutmix=1))
    plain, labels = load(None)
    for index in range(40):
        of_partner = (images[index] != plain[index]).any(dim=0)
        area = of_partner.sum() / of_partner.numel()
        if not of_partner.any():
            assert torch.equal(targets[index], F.one_hot(labels[index], CLASSES).float())
            continue
        rows, columns = of_partner.any(dim=1).nonzero()[[0, -1], 0], of_partner.any(dim=0).nonzero()[[0, -1], 0]
        assert of_partner[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1].all()
        [partner] = [
            other for other in range(40) if torch.equal(images[index][:, of_partner], plain[other][:, of_partner])
        ]
        expected = (1 - area) * F.one_hot(labels[index], CLASSES) + area * F.one_hot(labels[partner], CLASSES)
        torch.testing.assert_close(targets[index], expected)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_of_mixup_is_beta_distributed(alpha):
    shares = torch.tensor([blend.share for blend in draws(Mix(mixup=alpha), 4000)], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha), whose mean is 1/2
    assert abs(shares.mean() - 0.5) < 4 * (variance / 4000) ** 0.5
    assert abs(shares.var() / variance - 1) < 0.1
    # Its fourth central moment, from the kurtosis 3 - 6 / (2 alpha + 3).
    fourth = (3 - 6 / (2 * alpha + 3)) * variance**2
    assert abs((shares - 0.5).pow(4).mean() / fourth - 1) < 0.1


def test_lambda_of_cutmix_is_that_of_the_box_within_the_image():
    size = 32
    clipped = 0
    for blend in draws(Mix(cutmix=1), 2000, size=size):
        top, bottom, left, right = blend.box
        assert 0 <= top <= bottom <= size
        assert 0 <= left <= right <= size
        assert blend.share == 1 - (bottom - top) * (right - left) / size**2
        clipped += bottom - top != right - left
    assert clipped > 500  # a whole box is a square here


def test_boxes_are_centred_everywhere_and_have_the_drawn_area():
    """Far from the border nothing is cut off: the area is 1 - lambda, but for the rounding to an even number of pixels."""
    size, inside = 1000, 0
    for seed in range(300):
        rng = Random(seed)
        rng.random()  # the draw against `probability`
        share = rng.betavariate(1, 1)
        blend = Mix(cutmix=1).draw(size, rng=Random(seed))
        top, bottom, left, right = blend.box
        if top > 0 and bottom < size and left > 0 and right < size:
            inside += 1
            assert abs((1 - blend.share) ** 0.5 - (1 - share) ** 0.5) <= 2 / size
        else:
            assert blend.share >= share
    assert inside > 30


def test_probability_is_the_share_of_mixed_images():
    assert 700 < sum(blend is not None for blend in draws(Mix(mixup=1, probability=0.4), 2000)) < 900
    assert draws(Mix(mixup=1, cutmix=1, probability=0), 50) == [None] * 50
    assert draws(Mix(), 50) == [None] * 50


def test_with_both_a_fair_coin_chooses():
    kinds = Counter(blend.box is None for blend in draws(Mix(mixup=1, cutmix=1), 2000))
    assert 900 < kinds[True] < 1100
    assert kinds[True] + kinds[False] == 2000


def test_partners_are_all_the_others_alike():
    partners = Counter()
    for epoch in range(600):
        _, targets = load(Mix(mixup=50), length=CLASSES, indices=[3], epoch=epoch)
        [partner] = [label for label in targets[0].nonzero()[:, 0].tolist() if label != 3]
        partners[partner] += 1
    assert set(partners) == {0, 1, 2, 4, 5, 6}
    assert min(partners.values()) > 65
    assert max(partners.values()) < 135


def test_unmixed_images_are_those_without_mixing():
    images, targets = load(Mix(mixup=1, probability=0.5), augment=Augment())
    plain, labels = load(None, augment=Augment())
    alone = (images == plain).all(dim=(1, 2, 3))
    assert 8 < alone.sum() < 32
    assert torch.equal(targets[alone], F.one_hot(labels[alone], CLASSES).float())
    assert (targets[~alone].amax(dim=1) < 1).sum() > 8  # but for partners of the same class


def test_a_target_works_as_one_in_the_cross_entropy():
    _, targets = load(Mix(mixup=1))
    scores = torch.randn(40, CLASSES, generator=torch.Generator().manual_seed(0))
    expected = -(targets.double() * scores.double().log_softmax(dim=1)).sum()
    torch.testing.assert_close(F.cross_entropy(scores, targets, reduction="sum").double(), expected)


def test_blending_does_not_write_to_its_images():
    image, partner = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    for blend in (Blend(share=0.25), Blend(share=0.75, box=(0, 2, 2, 4))):
        result = mixed(image, partner, blend)
        assert result.mean().item() == 1 - blend.share
        assert (image == 0).all()
        assert (partner == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -0.1}, "mixup=-0.1: give the alpha"),
        ({"cutmix": float("nan")}, "cutmix=nan: give the alpha"),
        ({"mixup": float("inf")}, "mixup=inf"),
        ({"probability": 1.1}, "probability=1.1: give a share"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Mix(**settings)
