"""Which clients take part in a round: a function of (number, fraction, seed, round)."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchless.federated.sampling import sampled_clients


@given(number=st.integers(1, 200), fraction=st.floats(0.001, 1.0), seed=st.integers(0, 9), round=st.integers(1, 99))
def test_sorted_ids_of_distinct_clients_in_the_asked_number(number, fraction, seed, round):
    chosen = sampled_clients(number, fraction=fraction, seed=seed, round=round)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(range(number))
    assert len(chosen) == max(1, int(fraction * number + 0.5))


def test_a_share_that_is_no_binary_fraction_is_not_one_client_short():
    sizes = [len(sampled_clients(n, fraction=f, seed=0, round=1)) for n, f in ((100, 0.1), (100, 0.29), (10, 0.3))]
    assert sizes == [10, 29, 3]
    assert len(sampled_clients(5, fraction=0.5, seed=0, round=1)) == 3
    assert len(sampled_clients(100, fraction=0.001, seed=0, round=1)) == 1


def test_everyone_takes_part_at_fraction_one():
    assert sampled_clients(4, fraction=1.0, seed=3, round=7) == (0, 1, 2, 3)


def test_rounds_and_seeds_differ_and_nothing_else_is_read():
    def draws(seed: int) -> list[tuple[int, ...]]:
        return [sampled_clients(50, fraction=0.1, seed=seed, round=round) for round in range(1, 21)]

    random.seed(1)
    first = draws(0)
    state = random.getstate()
    assert draws(0) == first
    assert random.getstate() == state
    assert len(set(first)) == 20
    assert draws(1) != first


def test_every_client_has_the_same_chance():
    """2,000 rounds of 5 out of 20: each client is drawn 500 times on average, with a standard deviation of 19.4."""
    counts = Counter(c for r in range(2000) for c in sampled_clients(20, fraction=0.25, seed=0, round=r))
    assert sorted(counts) == list(range(20))
    assert min(counts.values()) > 500 - 4 * 19.4
    assert max(counts.values()) < 500 + 4 * 19.4


@pytest.mark.parametrize(
    ("number", "fraction", "word"), [(0, 0.5, "number=0"), (5, 0.0, "fraction=0"), (5, 1.1, "fraction=1.1")]
)
def test_what_cannot_be_is_said(number, fraction, word):
    with pytest.raises(ValueError, match=word):
        sampled_clients(number, fraction=fraction, seed=0, round=1)
