"""The sum of a round: its formula, its bits, and what it keeps."""

import pickle
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from federated_reference import summed_in_blocks, weighted_mean
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import same_bits

from batchless.federated.summing import BLOCK, PIECE, SumMemory, WeightedSum, sum_in_blocks
from batchless.federated.update import ClientFailedError, LeftOut, Update, failed


def update(client: int, *, shapes: Sequence[Sequence[int]] = ((40,), (3,))) -> Update:
    """Of a client whose values spread over many orders of magnitude, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(client)
    scales = [10.0 ** torch.randint(-6, 7, shape, generator=generator) for shape in shapes]
    values = [scale * torch.randn(scale.shape, generator=generator) for scale in scales]
    return Update(
        weight=float(client % 7 + 1),
        values={f"w{i}": value for i, value in enumerate(values)},
        counters={"n": torch.tensor([client, -client])},
        local={client: {"gain": torch.tensor([float(client)])}},
        metrics={f"domain {client % 2}": {"loss": (0.1 * client, 3.0)}},
        images=client,
        seconds=0.5,
    )


def lost(client: int) -> Update:
    return failed(ClientFailedError(client, "gone"))


@given(
    count=st.integers(1, 30),
    missing=st.sets(st.integers(0, 29), max_size=9),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
)
def test_the_sum_has_the_bits_of_the_definition(count, missing, shapes):
    """Against Python's own numbers, which are float64: blocks of 8 positions, each in order, then the blocks in order."""
    updates = [lost(at) if at in missing else update(at, shapes=shapes) for at in range(count)]
    total = sum_in_blocks(updates)
    arrived = [each for each in updates if each.left_out is None]
    for name in arrived[0].values if arrived else ():
        rows = [None if each.left_out else (each.weight, each.values[name].tolist()) for each in updates]
        flat = [row and (row[0], torch.tensor(row[1], dtype=torch.float64).flatten().tolist()) for row in rows]
        assert total.sums[name].flatten().tolist() == summed_in_blocks(flat, block=8)
        assert total.sums[name].shape == arrived[0].values[name].shape
    assert total.sums.keys() == (arrived[0].values.keys() if arrived else set())
    assert (total.weight, total.images) == (sum(u.weight for u in arrived), sum(u.images for u in arrived))
    assert total.local.keys() == {at for at in range(count) if at not in missing}
    assert [left.client for left in total.left_out] == sorted(at for at in missing if at < count)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_large_tensors_are_summed_in_pieces_to_the_same_bits(weight):
    shapes = {"small": (5,), "large": (3, PIECE // 2 + 1), "exact": (PIECE,), "last": (2, 2), "": ()}
    sums, values = WeightedSum(), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        values.append({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
        values[-1]["large"] = values[-1]["large"].t().contiguous().t()  # another order in memory
        sums.add(values[-1], weight)
    for name in shapes:
        first, second, third = (each[name].double() * weight for each in values)
        assert torch.equal(sums.tensors[name], first + second + third), name
    assert sums.weight == 3 * weight


def test_half_precision_and_float64_are_summed_in_float64():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        value = torch.randn(7, dtype=torch.float64).to(dtype)
        total = sum_in_blocks([Update(weight=3.0, values={"w": value})] * 2)
        assert torch.equal(total.sums["w"], value.double() * 3 + value.double() * 3)


def test_the_order_of_a_sum_does_show_in_its_bits():
    """What the blocks are for: these updates, added in another order, make another sum."""
    updates = [update(at) for at in range(20)]
    assert not same_bits(sum_in_blocks(updates).sums, sum_in_blocks(reversed(updates)).sums)
    in_one_go = WeightedSum()
    for each in updates:
        in_one_go.add(each.values, each.weight)
    assert not same_bits(sum_in_blocks(updates).sums, in_one_go.tensors)


def test_a_client_that_failed_leaves_its_position_empty():
    """Were the others to move up, another block would begin elsewhere."""
    updates = [lost(at) if at == 2 else update(at) for at in range(20)]
    moved = [each for each in updates if each.left_out is None]
    assert not same_bits(sum_in_blocks(updates).sums, sum_in_blocks(moved).sums)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_the_sums_are_the_formula(weights):
    values = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(len(weights))]
    total = sum_in_blocks(Update(weight=w, values={"w": v}) for w, v in zip(weights, values, strict=True))
    torch.testing.assert_close(total.sums["w"] / total.weight, weighted_mean(values, weights), rtol=1e-13, atol=1e-15)


def test_an_update_is_forgotten_when_it_is_added_and_its_memory_is_not_kept():
    """100 clients need no more memory than 10; a maker may overwrite its values once the next update is asked for."""
    alive: list[weakref.ref] = []
    most = 0
    shared, counts = torch.zeros(40), torch.zeros(2, dtype=torch.int64)

    def updates() -> Iterator[Update]:
        nonlocal most
        for position in range(100):
            made = update(position)
            shared.copy_(made.values["w0"])
            counts.copy_(made.counters["n"])
            made = replace(made, values={**made.values, "w0": shared}, counters={"n": counts})
            alive.append(weakref.ref(made))
            most = max(most, sum(ref() is not None for ref in alive))
            yield made

    streamed = sum_in_blocks(updates())
    assert most <= 3
    whole = sum_in_blocks([update(position) for position in range(100)])
    assert same_bits(streamed.sums, whole.sums)
    assert same_bits(streamed.counters, whole.counters)


@pytest.mark.parametrize("counts", [(3, 5), (20, 3), (3, 20), (20, 40)])
def test_memory_of_an_earlier_round_is_used_again_and_nothing_of_it_is_left(counts):
    memory = SumMemory()
    first, second = counts
    places = {sum_in_blocks(map(update, range(first)), memory=memory).sums["w0"].data_ptr()}
    places |= {each.tensors["w0"].data_ptr() for each in (memory.total, memory.block) if each.tensors}
    again = sum_in_blocks(map(update, range(50, 50 + second)), memory=memory)
    assert same_bits(again.sums, sum_in_blocks(map(update, range(50, 50 + second))).sums)
    if first > BLOCK or second <= BLOCK:
        assert again.sums["w0"].data_ptr() in places
    assert sum_in_blocks([lost(0)], memory=memory).sums == {}


def test_memory_of_another_network_is_laid_out_anew():
    memory = SumMemory()
    sum_in_blocks(map(update, range(20)), memory=memory)
    others = [update(at, shapes=((2, 2), (3,), ())) for at in range(12)]
    assert same_bits(sum_in_blocks(others, memory=memory).sums, sum_in_blocks(others).sums)


def test_metrics_add_by_domain():
    updates = [update(1), update(3), update(2)]
    losses = [update(client).metrics[f"domain {client % 2}"]["loss"][0] for client in (1, 2, 3)]
    total = sum_in_blocks(updates)
    assert total.metrics == {"domain 1": {"loss": (losses[0] + losses[2], 6.0)}, "domain 0": {"loss": (losses[1], 3.0)}}
    assert total.seconds == 1.5


def test_counters_take_the_maximum_in_their_own_type():
    total = sum_in_blocks([update(client) for client in (4, 9, 2)])
    assert total.counters["n"].dtype == torch.int64
    assert total.counters["n"].tolist() == [9, -2]


@pytest.mark.parametrize("counts", [4, 20])
def test_summing_leaves_the_updates_as_they_are(counts):
    updates = [update(client) for client in range(counts)]
    sum_in_blocks(updates)
    for client, one in enumerate(updates):
        assert same_bits(one.values, update(client).values)
        assert same_bits(one.counters, update(client).counters)


def test_a_client_is_in_one_place():
    with pytest.raises(ValueError, match="client 3 has brought two updates"):
        sum_in_blocks([update(3), update(3)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w0": torch.zeros(40)}, "different networks or algorithms: w1 is in one of them only"),
        ({"w0": torch.zeros(40), "w1": torch.zeros(4)}, r"w1 has the shape \(4,\), it was \(3,\)"),
    ],
)
def test_updates_of_different_networks_do_not_add(values, message):
    with pytest.raises(ValueError, match=message):
        sum_in_blocks([update(1), Update(weight=1.0, values=values)])


def test_a_failure_travels_between_processes():
    error = pickle.loads(pickle.dumps(ClientFailedError(7, "no\n such   file")))
    assert str(error) == "client 7: no such file"
    assert failed(error).left_out == LeftOut(client=7, reason="no such file")
    assert failed(error).weight == 0
