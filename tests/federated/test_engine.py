"""One round on whatever engine: the sum, the clients that are left out, and what is not forgiven."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import odd_images
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import client, federation, images, network, same_bits, settings

from batchless.federated import workers
from batchless.federated.algorithms import Algorithm, Centralized, FedAvg, FedBN, Standalone
from batchless.federated.engine import Engine, LocalEngine, Workplace, needed_locals, run_round
from batchless.federated.packing import Packed, tensors_of, with_tensors, without_tensors, written
from batchless.federated.partition import Client
from batchless.federated.server import ServerState, initial_state
from batchless.federated.summing import sum_in_blocks
from batchless.federated.update import Update
from batchless.federated.workers import WorkerEngine
from batchless.tasks import Classify
from batchless.train.interrupt import TrainingStoppedError, never_stop


def workplace(*clients: Client, algorithm: Algorithm | None = None) -> Workplace:
    return Workplace(
        model=network(),
        federation=federation(*clients),
        algorithm=FedAvg() if algorithm is None else algorithm,
        task=Classify(),
        settings=settings(),
    )


def one_round(engine: Engine, place: Workplace, state: ServerState, *, min_clients: int = 1, stop=never_stop):
    chosen = [one.id for one in place.clients()]
    return run_round(
        engine,
        place,
        state,
        chosen,
        {},
        min_clients=min_clients,
        should_stop=stop,
        on_client=lambda done, of: None,
    )


def begin(place: Workplace) -> ServerState:
    return initial_state(place.model, place.algorithm, 3)


def odd(kind: type, id: int, **given: Any) -> Client:
    return replace(client(id), train=kind(**vars(images(6, seed=id)), **given))


def states_equal(first: ServerState, second: ServerState) -> bool:
    return all(torch.equal(value, second.shared[name]) for name, value in first.shared.items())


# Tensors in one buffer.


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=6),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]), min_size=6
    ),
)
def test_packed_tensors_come_back(shapes, dtypes):
    tensors = {
        f"t.{i}/x": (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    packed = Packed.of(tensors)
    again = packed.tensors()
    assert list(again) == list(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
        tensor.zero_()
    packed.write(tensors)
    assert all(not bool(view.any()) for view in packed.tensors().values())


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.ones(2), "a": torch.ones(3)},
        {"a": torch.ones(3)},
        {"a": torch.ones(3), "b": torch.ones(2).double()},
        {"a": torch.ones(3), "b": torch.ones(2, 1)},
    ],
    ids=["order", "names", "types", "shapes"],
)
def test_tensors_that_do_not_fit_are_not_written(other):
    views = Packed.of({"a": torch.zeros(3), "b": torch.zeros(2)}).tensors()
    assert not written(other, views)
    assert not any(bool(view.any()) for view in views.values())
    assert written({"a": torch.ones(3), "b": torch.ones(2)}, views)
    assert all(bool(view.all()) for view in views.values())


def update(position: int) -> Update:
    generator = torch.Generator().manual_seed(position)
    return Update(
        weight=1.0 + position,
        values={"w": torch.randn(7, generator=generator)},
        counters={"n": torch.tensor(position)},
        local={position: {"gain": torch.tensor([float(position)])}},
        metrics={"dark": {"loss": (0.1 * position, 2.0)}},
        images=position,
        seconds=1.0,
    )


def test_an_update_survives_its_journey_and_keeps_nothing_of_the_buffer_but_its_values():
    given = update(4)
    packed = Packed.of(tensors_of(given))
    again = with_tensors(without_tensors(given), packed.tensors())
    packed.buffer.zero_()
    assert again.weight == given.weight
    assert again.counters == given.counters
    assert again.local == given.local
    assert not bool(again.values["w"].any())


# Clients that fail.


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_that_fails_is_left_out_and_named(workers):
    """The round is that of the others, at their positions."""
    place = workplace(client(0), client(1), odd(odd_images.Unreadable, 2), client(3))
    state = begin(place)
    if workers == 1:
        after, brought = one_round(LocalEngine(workplace=place), place, state)
    else:
        with WorkerEngine(place, state, count=workers, threads=1) as engine:
            after, brought = one_round(engine, place, state)
            after, brought = one_round(engine, place, state)  # nothing of the failure is left behind
    (left,) = brought.left_out
    assert left.client == 2
    assert "image 0 is damaged" in left.reason
    clients = place.clients()
    expected = sum_in_blocks(place.train(state, clients[p], None) for p in (0, 1, 3))
    for name, value in expected.sums.items():
        mean = (value / expected.weight).to(after.shared[name].dtype)
        assert torch.equal(after.shared[name], mean), name


def test_a_worker_that_dies_costs_its_client_only():
    place = workplace(client(0), odd(odd_images.Deadly, 1), client(2), client(3))
    state = begin(place)
    with WorkerEngine(place, state, count=2, threads=1) as engine:
        before = {worker.process.pid for worker in engine.workers}
        after, brought = one_round(engine, place, state)
        assert [(left.client, left.reason) for left in brought.left_out] == [
            (1, "its process ended (killed by SIGKILL)")
        ]
        assert len({worker.process.pid for worker in engine.workers} - before) == 1
        again, _ = one_round(engine, place, state)
    assert brought.images == 18
    assert states_equal(after, again)
    alive = {worker.process.pid for worker in engine.workers}
    assert not alive, "the workers have ended with the engine"


def test_what_a_dead_worker_had_still_to_do_is_done_by_another(monkeypatch):
    """Orders are given ahead where clients are quick."""
    monkeypatch.setattr(workers, "_QUICK", math.inf)
    place = workplace(*(odd(odd_images.Deadly, id) if id == 6 else client(id) for id in range(16)))
    state = begin(place)
    without = workplace(*(odd(odd_images.Unreadable, id) if id == 6 else client(id) for id in range(16)))
    expected, _ = one_round(LocalEngine(workplace=without), without, state)
    with WorkerEngine(place, state, count=2, threads=1) as engine:
        orders = set()
        for _ in engine.updates(state, range(16), {}):
            orders |= {len(worker.orders) for worker in engine.workers}
        assert orders >= {1, 2}, "some were given ahead, the last ones were not"
        found, brought = one_round(engine, place, state)
    assert [(left.client, left.reason) for left in brought.left_out] == [(6, "its process ended (killed by SIGKILL)")]
    assert states_equal(found, expected)


def test_a_client_that_hangs_costs_its_part_of_one_round(tmp_path):
    """It is named, its process replaced, and the others' bits are those of a round that it failed in at once."""
    place = workplace(client(0), odd(odd_images.Hanging, 1, unblocked=str(tmp_path / "file")), client(2), client(3))
    state = begin(place)
    without = workplace(client(0), odd(odd_images.Unreadable, 1), client(2), client(3))
    expected, _ = one_round(LocalEngine(workplace=without), without, state)
    with WorkerEngine(place, state, count=2, threads=1, timeout=6.0) as engine:
        before = {worker.process.pid for worker in engine.workers}
        after, brought = one_round(engine, place, state)
        assert [(left.client, left.reason) for left in brought.left_out] == [(1, "did not answer within 6 seconds")]
        assert len({worker.process.pid for worker in engine.workers} - before) == 1
        again, whole = one_round(engine, place, after)
    assert states_equal(after, expected)
    assert not whole.left_out
    assert states_equal(again, one_round(LocalEngine(workplace=place), place, after)[0])


def test_an_evaluation_that_hangs_ends_the_run_with_a_message(tmp_path):
    place = workplace(client(0), client(1))
    hanging = odd(odd_images.Hanging, 0, unblocked=str(tmp_path / "file")).train
    place = replace(place, federation=replace(place.federation, tests={"dark": hanging}))
    state = begin(place)
    message = "evaluation of dark failed: did not answer within 3 seconds; give more client_timeout"
    with (
        WorkerEngine(place, state, count=1, threads=1, timeout=3.0) as engine,
        pytest.raises(ValueError, match=message),
    ):
        engine.figures(state, {})


def test_too_few_clients_left_is_one_line_with_the_reasons():
    place = workplace(client(0), odd(odd_images.Unreadable, 1), odd(odd_images.Unreadable, 2))
    state = begin(place)
    message = r"round 1: 1 of 3 clients left, min_clients is 2 \(client 1: .*damaged; client 2: .*damaged\)"
    with pytest.raises(ValueError, match=message) as raised:
        one_round(LocalEngine(workplace=place), place, state, min_clients=2)
    assert "\n" not in str(raised.value)
    assert one_round(LocalEngine(workplace=place), place, state, min_clients=1)[0].round == 1


def test_an_error_that_is_not_a_clients_is_not_forgiven():
    place = workplace(client(0), odd(odd_images.Buggy, 1))
    state = begin(place)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        one_round(LocalEngine(workplace=place), place, state)
    with (
        WorkerEngine(place, state, count=2, threads=1) as engine,
        pytest.raises(RuntimeError, match=r"Traceback[\s\S]*odd_images[\s\S]*a bug of ours"),
    ):
        one_round(engine, place, state)


def test_slow_clients_change_no_bit_and_the_others_do_not_run_far_ahead():
    """The first client takes longest: the others wait for it with what they have, three positions a worker at most."""
    place = workplace(odd(odd_images.Slow, 0), *(client(id) for id in range(1, 12)))
    state = begin(place)
    expected, _ = one_round(LocalEngine(workplace=place), place, state)
    with WorkerEngine(place, state, count=2, threads=1) as engine:
        updates = engine.updates(state, range(12), {})
        next(updates)
        # Nothing has been freed yet, so each slot is a position; later a worker may make more while another's lie free.
        assert sum(len(worker.slots) for worker in engine.workers) <= 6
        assert len(list(updates)) == 11
        assert all(worker.slots for worker in engine.workers), "each has trained somebody"
        found, _ = one_round(engine, place, state)
    assert states_equal(expected, found)


def test_an_update_stays_as_it_is_until_the_next_is_asked_for():
    """Also where clients before it have failed, and the one that sums them takes longer than those who train."""
    kinds = {0: odd_images.Slow, 1: odd_images.Unreadable, 3: odd_images.Unreadable}
    place = workplace(*(odd(kinds[id], id) if id in kinds else client(id) for id in range(10)))
    state = begin(place)
    expected = {}
    for update in LocalEngine(workplace=place).updates(state, range(10), {}):
        expected[len(expected)] = {name: value.clone() for name, value in update.values.items()}
    with WorkerEngine(place, state, count=2, threads=1) as engine:
        for position, update in enumerate(engine.updates(state, range(10), {})):
            time.sleep(0.2)
            assert same_bits(update.values, expected[position]), position


def test_stopping_within_a_round():
    place = workplace(*(client(id) for id in range(4)))
    state = begin(place)
    asked = iter([False, True, True])
    with pytest.raises(TrainingStoppedError):
        one_round(LocalEngine(workplace=place), place, state, stop=lambda: next(asked))
    assert next(asked), "asked twice: after the second client there was no third"
    # After the last client nothing would be saved by stopping.
    assert one_round(LocalEngine(workplace=place), place, state, stop=iter([False] * 3).__next__)[0].round == 1


# Evaluation and what it needs.


@pytest.mark.parametrize("algorithm", [FedAvg(), FedBN(), Standalone(), Centralized()], ids=lambda a: a.name)
def test_workers_evaluate_as_one_process_does(algorithm):
    place = workplace(client(0), client(1, domain="light"), client(2), algorithm=algorithm)
    place = replace(place, federation=replace(place.federation, domains=("dark", "light")))
    state = begin(place)
    after, brought = one_round(LocalEngine(workplace=place), place, state)
    expected = LocalEngine(workplace=place).figures(after, brought.local)
    with WorkerEngine(place, state, count=2, threads=1) as engine:
        assert engine.figures(after, brought.local) == expected
    assert list(expected) == ["dark", "light"]


def test_only_the_local_tensors_that_are_read_are_sent():
    made = federation(client(0), client(1, domain="light"), client(2), unseen=("far",))
    locals = {id: {"gain": torch.tensor([float(id)])} for id in range(3)}

    def sent(domain: str, having: Sequence[int] = (0, 1, 2)) -> list[int]:
        return sorted(needed_locals(made, {id: locals[id] for id in having}, domain))

    assert sent("dark") == [0, 2]
    assert sent("light") == [1]
    assert sent("far") == [0, 1, 2]
    assert sent("dark", having=(1, 2)) == [1, 2]  # client 0 has none yet: it may need the mean of all


def test_shared_memory_that_is_too_small_is_said_before_anything_starts(monkeypatch, tmp_path):
    place = workplace(client(0), client(1))
    state = begin(place)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr("batchless.federated.packing._SHARED_MEMORY", tmp_path)
    with pytest.raises(ValueError, match=r"2 workers need about \d+ MB in .*, 0 MB are free: use fewer workers"):
        WorkerEngine(place, state, count=2, threads=1)
