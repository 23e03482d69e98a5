"""How a domain's images are dealt out: every image once, in the promised proportions, by the seed alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchless.federated.partitioners import (
    IID,
    PARTITIONERS,
    Dirichlet,
    Shards,
    Slices,
    parse_partitioner,
    partitioner_name,
)

ALL = [Slices(), IID(), Dirichlet(alpha=1, minimum=1), Shards(per_client=2)]
TEN_BY_HUNDRED = [label for label in range(10) for _ in range(100)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def label_counts(part: list[int], labels: list[int]) -> Counter[int]:
    return Counter(labels[index] for index in part)


@given(
    labels=st.lists(st.integers(0, 4), min_size=40, max_size=150),
    clients=st.integers(1, 8),
    seed=st.integers(0, 3),
    partitioner=st.sampled_from(ALL),
)
def test_every_image_goes_to_exactly_one_client(labels, clients, seed, partitioner):
    parts = partitioner.split(labels, clients, rng=rng(seed))
    assert len(parts) == clients
    assert all(parts)
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    assert all(type(index) is int for part in parts for index in part)


@pytest.mark.parametrize("partitioner", ALL, ids=partitioner_name)
def test_the_seed_decides(partitioner):
    one, again, other = (partitioner.split(TEN_BY_HUNDRED, 7, rng=rng(seed)) for seed in (0, 0, 1))
    assert one == again
    assert (one == other) == (type(partitioner) is Slices)


def test_slices_are_fedbns_partitions():
    """7438 images in ten parts of 743 or 744, consecutive and in the given order."""
    parts = Slices().split([0] * 7438, 10, rng=rng())
    assert [index for part in parts for index in part] == list(range(7438))
    assert Counter(map(len, parts)) == {744: 8, 743: 2}


def test_iid_clients_have_equal_sizes_and_the_domains_mixture():
    parts = IID().split(TEN_BY_HUNDRED, 3, rng=rng())
    assert sorted(map(len, parts)) == [333, 333, 334]
    # Hypergeometric: mean 33.3, standard deviation 4.5 for each class.
    assert all(15 < count < 52 for part in parts for count in label_counts(part, TEN_BY_HUNDRED).values())
    assert parts[0] != sorted(parts[0])


def test_a_large_alpha_is_nearly_iid_and_a_small_one_is_not():
    spread = {}
    for alpha in (0.1, 1.0, 1e6):
        parts = Dirichlet(alpha=alpha, minimum=1).split(TEN_BY_HUNDRED, 10, rng=rng())
        counts = np.array([[label_counts(part, TEN_BY_HUNDRED)[label] for label in range(10)] for part in parts])
        spread[alpha] = counts.std()
    assert spread[0.1] > 2 * spread[1.0] > 8 * spread[1e6]
    assert spread[1e6] < 1


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    """A client's share of a class has mean 1/n and variance (1/n)(1 - 1/n)/(n alpha + 1): from 400 draws of 10 classes."""
    labels = [label for label in range(10) for _ in range(1000)]
    generator, clients, alpha = rng(), 4, 0.7
    shares = []
    for _ in range(400):
        parts = Dirichlet(alpha=alpha, minimum=1).split(labels, clients, rng=generator)
        counts = label_counts(parts[0], labels)
        shares += [counts[label] / 1000 for label in range(10)]
    mean, variance = 1 / clients, (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.mean(shares) == pytest.approx(mean, abs=0.015)
    assert np.var(shares) == pytest.approx(variance, rel=0.1)


@given(seed=st.integers(0, 50), minimum=st.integers(1, 30))
def test_dirichlet_keeps_the_minimum(seed, minimum):
    parts = Dirichlet(alpha=0.3, minimum=minimum).split(TEN_BY_HUNDRED, 10, rng=rng(seed))
    assert min(map(len, parts)) >= minimum


def test_dirichlet_parts_are_in_random_order_so_that_their_end_is_a_fair_sample():
    part = max(Dirichlet(alpha=1, minimum=1).split(TEN_BY_HUNDRED, 2, rng=rng()), key=len)
    labels = [TEN_BY_HUNDRED[index] for index in part]
    assert len(set(labels[-50:])) > 5


def test_an_impossible_minimum_is_refused_at_once_and_an_unlikely_one_after_the_draws():
    with pytest.raises(ValueError, match=r"10 clients with minimum=101 images each need 1010, there are 1000: fewer"):
        Dirichlet(alpha=1, minimum=101).split(TEN_BY_HUNDRED, 10, rng=rng())
    with pytest.raises(
        ValueError, match=r"in 1000 draws with alpha=0.01 .* at most \d+ of minimum=99 images: a larger"
    ):
        Dirichlet(alpha=0.01, minimum=99).split(TEN_BY_HUNDRED, 10, rng=rng())


def test_two_shards_give_most_clients_two_classes():
    parts = Shards(per_client=2).split(TEN_BY_HUNDRED, 50, rng=rng())
    assert {len(part) for part in parts} == {20}
    classes = [len(label_counts(part, TEN_BY_HUNDRED)) for part in parts]
    assert max(classes) == 2
    assert np.mean(classes) > 1.7


def test_more_shards_than_images_are_refused():
    with pytest.raises(ValueError, match=r"6 clients with per_client=2 need 12 shards .* there are 10 images"):
        Shards(per_client=2).split([0] * 10, 6, rng=rng())


@pytest.mark.parametrize("name", PARTITIONERS)
def test_names_lead_to_partitioners_and_back(name):
    assert partitioner_name(parse_partitioner(name)) == name


def test_wrong_names_and_settings_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="partitioner='dirichlet_': did you mean 'dirichlet'"):
        parse_partitioner("dirichlet_")
    with pytest.raises(ValueError, match="there are iid, slices, dirichlet, shards"):
        parse_partitioner("xyz")
    with pytest.raises(ValueError, match="dirichlet has no setting 'beta': its settings are alpha, minimum"):
        parse_partitioner("dirichlet", beta=1)
    with pytest.raises(ValueError, match="iid has no setting 'alpha': it has no settings"):
        parse_partitioner("iid", alpha=1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dirichlet", {"alpha": 0.0}),
        ("dirichlet", {"alpha": float("nan")}),
        ("dirichlet", {"alpha": float("inf")}),
        ("dirichlet", {"minimum": 0}),
        ("shards", {"per_client": 0}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError, match=f"{name}: {next(iter(settings))}="):
        parse_partitioner(name, **settings)
