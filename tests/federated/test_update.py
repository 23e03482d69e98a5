"""Updates add; their sum has the same bits whoever adds them."""

import pickle

import pytest
import torch
from federated_reference import weighted_mean
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import same_bits

from batchless.federated.update import BLOCK, ClientFailedError, LeftOut, Update, add_in_blocks, failed, sum_of


def update(client: int, *, weight: float | None = None, seed: int | None = None) -> Update:
    """Of a client whose values spread over many orders of magnitude, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(client if seed is None else seed)
    value = torch.randn(40, generator=generator) * 10.0 ** torch.randint(-6, 7, (40,), generator=generator)
    weight = float(client % 7 + 1) if weight is None else weight
    return Update(
        weight=weight,
        sums={"w": value.double() * weight, "b": value[:3].double() * weight},
        counters={"n": torch.tensor([client, -client])},
        local={client: {"gain": value[:2]}},
        metrics={f"domain {client % 2}": {"loss": (float(value[0]), 3.0)}},
        images=client,
        seconds=0.5,
    )


def by_workers(updates: dict[int, Update], order: list[int]) -> Update:
    """Blocks summed in another order, as by workers that finish when they finish, then added in order."""
    positions = {position // BLOCK for position in updates}
    sums = {}
    for block in sorted(positions, key=lambda block: order[block % len(order)]):
        sums[block] = sum_of(updates[at] for at in range(block * BLOCK, (block + 1) * BLOCK) if at in updates)
    return sum_of(sums[block] for block in sorted(sums))


@given(st.sets(st.integers(0, 39), min_size=1), st.permutations(range(5)), st.sets(st.integers(0, 39), max_size=5))
def test_the_bits_do_not_depend_on_who_summed_which_block(positions, order, lost):
    updates = {at: failed(ClientFailedError(at, "gone")) if at in lost else update(at) for at in positions}
    whole, other = add_in_blocks(updates), by_workers(updates, list(order))
    for part in ("sums", "counters"):
        assert same_bits(getattr(whole, part), getattr(other, part))
    assert (whole.weight, whole.metrics, whole.images) == (other.weight, other.metrics, other.images)
    assert whole.local.keys() == positions - lost
    assert [left.client for left in whole.left_out] == sorted(positions & lost)


def test_the_order_of_a_sum_does_show_in_its_bits():
    """What the blocks are for: these updates, added in another order, make another sum."""
    updates = {at: update(at) for at in range(20)}
    backwards = sum_of(updates[at] for at in reversed(range(20)))
    assert not same_bits(add_in_blocks(updates).sums, backwards.sums)


def test_a_client_that_failed_leaves_its_position_empty():
    """Were the others to move up, another block would begin elsewhere."""
    updates = {at: update(at) for at in range(20) if at != 2}
    moved = dict(enumerate(updates.values()))
    assert not same_bits(add_in_blocks(updates).sums, add_in_blocks(moved).sums)
    replaced = {**updates, 2: failed(ClientFailedError(2, "dead"))}
    assert same_bits(add_in_blocks(updates).sums, add_in_blocks(replaced).sums)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_the_sums_are_the_formula(weights):
    values = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(len(weights))]
    total = add_in_blocks(
        {i: Update(weight=w, sums={"w": v.double() * w}) for i, (w, v) in enumerate(zip(weights, values, strict=True))}
    )
    torch.testing.assert_close(total.sums["w"] / total.weight, weighted_mean(values, weights), rtol=1e-13, atol=1e-15)


def test_nobodys_update_is_the_zero():
    one = update(3)
    for both in (one + Update(), Update() + one, sum_of([Update(), one, Update()])):
        assert same_bits(both.sums, one.sums)
        assert same_bits(both.counters, one.counters)
        assert (both.weight, both.metrics, both.images, both.seconds) == (one.weight, one.metrics, one.images, 0.5)


def test_metrics_add_by_domain():
    total = update(1) + update(3) + update(2)
    losses = [update(client).metrics[f"domain {client % 2}"]["loss"][0] for client in (1, 2, 3)]
    assert total.metrics == {"domain 1": {"loss": (losses[0] + losses[2], 6.0)}, "domain 0": {"loss": (losses[1], 3.0)}}


def test_counters_take_the_maximum_in_their_own_type():
    total = sum_of([update(client) for client in (4, 9, 2)])
    assert total.counters["n"].dtype == torch.int64
    assert total.counters["n"].tolist() == [9, -2]


def test_summing_leaves_the_updates_as_they_are():
    updates = [update(client) for client in range(4)]
    sum_of(updates)
    add_in_blocks(dict(enumerate(updates)))
    for client, one in enumerate(updates):
        assert same_bits(one.sums, update(client).sums)


def test_a_client_is_in_one_place():
    with pytest.raises(ValueError, match="client 3 is in both updates"):
        update(3) + update(3)


def test_updates_of_different_networks_do_not_add():
    with pytest.raises(ValueError, match="different networks or algorithms: b is in one of them only"):
        update(1) + Update(weight=1, sums={"w": torch.zeros(40)})


def test_a_failure_travels_between_processes():
    error = pickle.loads(pickle.dumps(ClientFailedError(7, "no\n such   file")))
    assert str(error) == "client 7: no such file"
    assert failed(error).left_out == (LeftOut(client=7, reason="no such file"),)
    assert failed(error).weight == 0
