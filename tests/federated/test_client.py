"""Local training: FedAvg of one client is plain training, and what each algorithm changes."""

from dataclasses import replace
from random import Random

import pytest
import timm
import torch
import torch.nn.functional as F
from federated_reference import proximal_steps
from tiny_federation import (
    SIZE,
    STATISTICS,
    Double,
    client,
    federation,
    images,
    network,
    one_round,
    rounds,
    same_bits,
    settings,
)
from torch import Tensor, nn

from batchless.federated import client as client_module
from batchless.federated.algorithms import ALGORITHMS, Centralized, FedAvg, FedBN, FedProx, FedWon, FixBN, SiloBN
from batchless.federated.client import ClientSettings, load_state, participants, train_client, training_mode
from batchless.federated.server import initial_state
from batchless.federated.update import ClientFailedError
from batchless.nn import BatchChannelNorm
from batchless.tasks import Classify, ImageData
from batchless.train import AGC, LoopSettings, OptimizerSettings, train

THREE = (client(0, 7), client(1, 6, domain="light"), client(2, 5))


def sgd(**changes: object) -> OptimizerSettings:
    return replace(settings().optimizer, **changes)


def client_seed(one: int, *, seed: int = 0, round: int = 0) -> int:
    """As the federation derives it: a function of (seed, round, client)."""
    return Random(f"client/{seed}/{round}/{one}").getrandbits(63)


def data_of(one: int, count: int, *, round: int = 0) -> ImageData:
    own = client(one, count)
    return ImageData(
        train_images=own.train,
        test_images=own.train,
        image_size=SIZE,
        augment=None,
        statistics=STATISTICS,
        seed=client_seed(one, round=round),
    )


@pytest.mark.parametrize("normalizer", ["bn", "gn+ws", "bcn-micro+ws", "none+sws"])
@pytest.mark.parametrize(("per_forward", "per_step"), [(2, 4), (4, 4), (1, 1)])
def test_fedavg_of_one_client_is_plain_training(normalizer, per_forward, per_step):
    """Two rounds of two epochs each, to the bit, also with batch statistics and estimates."""
    pieces = {"images_per_forward": per_forward, "images_per_step": per_step}
    plain = network(normalizer)
    for round in range(2):
        loop = LoopSettings(images=20, evaluations=1, optimizer=settings().optimizer, **pieces)
        train(plain, Classify(), data_of(3, 10, round=round), loop, None)
    model = network(normalizer)
    state, _ = rounds(FedAvg(), model, (client(3, 10),), 2, local_epochs=2, **pieces)
    assert same_bits({name: state.shared[name] for name in plain.state_dict()}, plain.state_dict())


@pytest.mark.parametrize("normalizer", ["bn", "none+sws"])
def test_fedprox_of_mu_0_and_fedwon_are_fedavg_bit_for_bit(normalizer):
    states = [rounds(kind, network(normalizer), THREE, 2)[0] for kind in (FedAvg(), FedProx(mu=0), FedWon())]
    assert same_bits(states[0].shared, states[1].shared)
    assert same_bits(states[0].shared, states[2].shared)
    assert not same_bits(states[0].shared, rounds(FedProx(mu=0.1), network(normalizer), THREE, 2)[0].shared)


def micro_batches(one: int, count: int, *, round: int, epochs: int) -> list[list[tuple[Tensor, Tensor]]]:
    """A client's steps of 4 images in micro-batches of 2, float64."""
    data, steps = data_of(one, count, round=round), []
    for epoch in range(epochs):
        order = data.order(epoch)
        for at in range(0, count, 4):
            step = order[at : at + 4]
            parts = data.train(epoch, [step[i : i + 2] for i in range(0, len(step), 2)])
            steps.append([(x.double(), y) for x, y in parts])
    return steps


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def test_fedprox_is_the_formula_and_is_clipped_as_a_whole():
    """Squared norm, one sum, anchored at each round's start; the gradient of the whole objective is what is clipped."""
    mu, clip, rate = 2.0, 0.6, 0.2
    optimizer = sgd(learning_rate=rate, clip_norm=clip)
    model = network("gn").double()
    task = Double()
    state, _ = rounds(FedProx(mu=mu), model, (client(3, 10),), 2, local_epochs=2, optimizer=optimizer, task=task)
    reference, wrong = network("gn").double(), network("gn").double()
    for round in range(2):
        steps = micro_batches(3, 10, round=round, epochs=2)
        values = {"mu": mu, "learning_rate": rate, "clip_norm": clip}
        assert proximal_steps(reference, steps, cross_entropy, **values) > 1.1 * clip, "nothing was clipped"
        proximal_steps(wrong, steps, cross_entropy, clip_first=True, **values)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state.shared[name], value, rtol=1e-9, atol=1e-12)
    assert max(float((state.shared[n] - v).abs().max()) for n, v in wrong.state_dict().items()) > 1e-4


def test_fedprox_holds_on_to_the_rounds_start_and_to_frozen_parameters_not_at_all():
    model = network("gn")
    model[0].requires_grad_(False)
    start = network("gn").state_dict()
    distances = []
    for mu in (0.0, 1.0, 10.0):
        update = one_round(
            FedProx(mu=mu), model, THREE[:1], initial_state(network("gn"), FedProx(mu=mu), 1), {}, local_epochs=4
        )
        moved = {name: update.sums[name] / update.weight - start[name] for name in start}
        assert not moved["0.weight"].any()
        distances.append(float(sum(m.square().sum() for m in moved.values())))
    assert distances[0] > distances[1] > distances[2] > 0


def test_adaptive_clipping_bounds_each_units_step():
    """Lambda 0.1 and one step: no unit moves by more than rate * lambda * max(||W||, 1e-3)."""
    model, rate = network("none+sws"), 5.0
    optimizer = sgd(learning_rate=rate, adaptive_clipping=0.1)
    state = initial_state(model, FedWon(), 1)
    update = one_round(
        FedWon(), model, THREE[2:], state, {}, optimizer=optimizer, images_per_forward=1, images_per_step=5
    )
    free = one_round(
        FedWon(),
        model,
        THREE[2:],
        state,
        {},
        optimizer=sgd(learning_rate=rate),
        images_per_forward=1,
        images_per_step=5,
    )
    over = []
    for name in ("0.weight", "6.weight"):
        before = state.shared[name].double().flatten(1)
        bound = rate * AGC(0.1).clipping * before.norm(dim=1).clamp_min(1e-3)
        for one, result in (("clipped", update), ("free", free)):
            step = ((result.sums[name] / result.weight).flatten(1) - before).norm(dim=1)
            if one == "clipped":
                assert bool((step <= bound * (1 + 1e-5)).all()), name
            else:
                over.append(bool((step > bound * 1.01).any()))
    assert any(over), "nothing would have been clipped"


@pytest.mark.parametrize("normalizer", ["bn", "bcn-micro+ws", "bcn+ws"])
def test_fixbn_freezes_statistics_and_only_those(normalizer):
    model = network(normalizer)
    algorithm = FixBN(freeze_after=0.5)
    statistics = {name for name in model.state_dict() if "running" in name}
    counters = {name for name, value in model.state_dict().items() if value.dtype == torch.int64}
    before = initial_state(model, algorithm, 4)
    frozen = [False, False, True, True]
    for round in range(4):
        state, _ = rounds(algorithm, network(normalizer), THREE, round + 1, planned=4)
        for name, value in state.shared.items():
            if name.endswith("memory"):
                continue
            stands_still = frozen[round] and name in statistics | counters
            assert torch.equal(value, before.shared[name]) == stands_still, (round, name)
        before = state
    assert "1.weight" in before.shared


def test_fixbn_goes_by_the_planned_rounds():
    one, two = (rounds(FixBN(), network(), THREE, 2, planned=planned)[0] for planned in (2, 4))
    plain = rounds(FedAvg(), network(), THREE, 2)[0]
    assert same_bits(two.shared, plain.shared)
    assert not same_bits(one.shared, plain.shared)


def test_frozen_statistics_put_nothing_else_in_evaluation_mode():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 2, 1),
            "norm": nn.BatchNorm2d(2),
            "drop": nn.Dropout(0.5),
            "bcn": BatchChannelNorm(4, 2),
            "timm": timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout),
        }
    )
    training_mode(model.eval(), frozen_statistics=True)
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name for name, training in modes.items() if not training} == {"norm", "bcn", "bcn.batch_norm", "timm"}
    assert modes["timm.drop"]
    training_mode(model, frozen_statistics=False)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_an_update_is_a_function_of_its_arguments_not_of_the_resident_model(kind):
    """Another network's leftovers, other modes, another global random state: the same bits."""
    normalizer = "none+sws" if kind is FedWon else "bn"
    algorithm, optimizer = kind(), sgd(momentum=0.9, weight_decay=0.01)
    fresh, used = network(normalizer, dropout=0.5), network(normalizer, seed=7, dropout=0.5)
    state = initial_state(network(normalizer, seed=1, dropout=0.5), algorithm, 3)
    used.eval()
    first = one_round(algorithm, fresh, THREE[:1], state, {}, optimizer=optimizer)
    one_round(algorithm, used, THREE[1:], state, {}, optimizer=optimizer)
    torch.manual_seed(1234)
    second = one_round(algorithm, used, THREE[:1], state, {}, optimizer=optimizer)
    assert same_bits(first.sums, second.sums)
    assert same_bits(first.counters, second.counters)
    assert first.local.keys() == second.local.keys()
    assert all(same_bits(first.local[one], second.local[one]) for one in first.local)
    assert first.metrics == second.metrics


def test_random_numbers_differ_by_client_round_and_seed():
    model, algorithm = network(dropout=0.5), FedAvg()
    state = initial_state(model, algorithm, 4)
    same_images = [replace(THREE[0], id=one) for one in (0, 1)]
    variants = [
        one_round(algorithm, model, (same_images[0],), state, {}),
        one_round(algorithm, model, (same_images[1],), state, {}),
        one_round(algorithm, model, (same_images[0],), replace(state, round=1), {}),
        one_round(algorithm, model, (same_images[0],), state, {}, seed=1),
    ]
    losses = {update.metrics["dark"]["loss"] for update in variants}
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("algorithm", "local"),
    [
        (SiloBN(), {"1.running_mean", "1.running_var", "1.num_batches_tracked"}),
        (FedBN(), {"1.running_mean", "1.running_var", "1.num_batches_tracked", "1.weight", "1.bias"}),
    ],
)
def test_what_stays_with_a_client_goes_on_where_it_was(algorithm, local):
    model = network()
    state, locals = rounds(algorithm, model, THREE, 1)
    assert all(tensors.keys() == local for tensors in locals.values())
    assert not torch.equal(locals[0]["1.running_mean"], locals[1]["1.running_mean"])
    again = one_round(algorithm, model, THREE, state, locals)
    micro_batches = 3  # of a client's 7 images: 2 2, and 3 in the last step
    assert int(again.local[0]["1.num_batches_tracked"]) == 2 * micro_batches
    begun = one_round(algorithm, model, THREE[:1], state, {})
    assert int(begun.local[0]["1.num_batches_tracked"]) == micro_batches
    assert not again.sums.keys() & local


def test_a_network_without_normalization_leaves_nothing_with_the_client():
    states = [rounds(kind, network("none+sws"), THREE, 2) for kind in (FedAvg(), FedBN(), SiloBN())]
    for state, locals in states:
        assert same_bits(state.shared, states[0][0].shared)
        assert locals == {}


def test_clients_weigh_by_images_or_the_same():
    state = initial_state(network(), FedAvg(), 1)
    by_images = one_round(FedAvg(), network(), THREE, state, {})
    equal = one_round(FedAvg(weighting="equal"), network(), THREE, state, {}, local_epochs=1)
    assert (by_images.weight, equal.weight) == (18.0, 3.0)
    alone = [one_round(FedAvg(), network(), (one,), state, {}) for one in THREE]
    means = [one.sums["6.bias"] / one.weight for one in alone]
    expected = sum(mean * n / 18 for mean, n in zip(means, (7, 6, 5), strict=True))
    torch.testing.assert_close(by_images.sums["6.bias"] / 18, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(equal.sums["6.bias"] / 3, sum(means) / 3, rtol=1e-12, atol=1e-15)


def test_the_pieces_of_a_step_change_nothing_without_batch_statistics():
    state = initial_state(network("gn+ws").double(), FedAvg(), 1)
    sums = [
        one_round(
            FedAvg(),
            network("gn+ws").double(),
            THREE[1:2],
            state,
            {},
            images_per_forward=n,
            images_per_step=4,
            task=Double(),
        ).sums
        for n in (1, 2, 4)
    ]
    for other in sums[1:]:
        for name, value in sums[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-13)


def test_the_last_single_image_joins_those_before_it():
    """BatchNorm1d has nothing to say about one image: 7 images in twos would end in an error otherwise."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    state = initial_state(model, FedAvg(), 1)
    update = one_round(FedAvg(), model, THREE[:1], state, {}, images_per_step=2)
    assert (update.images, update.metrics["dark"]["loss"][1]) == (7, 7.0)
    assert int(update.counters["2.num_batches_tracked"]) == 3
    with pytest.raises(ClientFailedError, match="client 0: Expected more than 1 value per channel"):
        one_round(FedAvg(), model, THREE[:1], state, {}, images_per_forward=1, images_per_step=1)


def test_the_schedule_goes_over_all_planned_rounds():
    """One step in round r of 4, cosine: the rate is that of the share (r + 1/2) / 4."""
    model = network("gn")
    optimizer = sgd(schedule="cosine", learning_rate=0.1)
    start = initial_state(model, FedAvg(), 4)
    moves = []
    for round in (0, 3):
        state = replace(start, round=round)
        update = one_round(FedAvg(), model, (client(5, 4),), state, {}, optimizer=optimizer)
        moves.append((update.sums["6.bias"] / update.weight - start.shared["6.bias"]).norm())
    rates = [optimizer.learning_rate_at((round + 0.5) / 4, images_per_step=4) for round in (0, 3)]
    assert float(moves[1] / moves[0]) == pytest.approx(rates[1] / rates[0], rel=1e-4)
    assert rates[1] / rates[0] < 0.1


def test_a_client_whose_training_explodes_is_named():
    with pytest.raises(ClientFailedError, match=r"client 0: .* became NaN or infinite: lower the learning rate"):
        one_round(
            FedAvg(), network("none"), THREE[:1], initial_state(network("none"), FedAvg(), 1), {},
            optimizer=sgd(learning_rate=1e30), local_epochs=4,
        )  # fmt: skip


def test_a_client_whose_image_cannot_be_read_is_named():
    broken = replace(THREE[0], train=replace(images(4, seed=0), labels=(0, 1, 9, 0)))
    with pytest.raises(ClientFailedError, match="client 0: noise 0 2: label 9 is out of range"):
        one_round(FedAvg(), network(), (broken,), initial_state(network(), FedAvg(), 1), {})


def test_statistics_over_processes_that_train_different_clients_are_refused(monkeypatch):
    monkeypatch.setattr(client_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(client_module.dist, "get_world_size", lambda: 2)
    model = network("sync-bn")
    with pytest.raises(ValueError, match="1 takes its statistics over all processes") as raised:
        one_round(FedAvg(), model, THREE[:1], initial_state(model, FedAvg(), 1), {})
    assert not isinstance(raised.value, ClientFailedError)
    one_round(FedAvg(), network(), THREE[:1], initial_state(network(), FedAvg(), 1), {})


def test_centralized_trains_one_client_that_has_all_images():
    world = federation(*THREE)
    assert participants(world, FedAvg()) == world.clients
    (everyone,) = participants(world, Centralized())
    assert len(everyone.train) == 18
    assert everyone.train.classes == world.classes
    sources = [everyone.train.source(index) for index in (0, 6, 7, 12, 13, 17)]
    assert sources == ["noise 0 0", "noise 0 6", "noise 1 0", "noise 1 5", "noise 2 0", "noise 2 4"]
    assert torch.equal(everyone.train.image(13), THREE[2].train.image(0))
    assert everyone.train.label(8) == THREE[1].train.label(1)
    with pytest.raises(IndexError):
        everyone.train.image(18)
    update = one_round(Centralized(), network(), (everyone,), initial_state(network(), Centralized(), 1), {})
    assert (update.weight, update.images, update.metrics.keys()) == (18.0, 18, {"all"})


def test_the_updates_values_are_the_networks_own():
    """No copy is made: whoever wants them reads them before the network trains again."""
    model = network()
    update = train_client(
        model, initial_state(model, FedAvg(), 1), THREE[0], FedAvg(), Classify(), settings(), local=None
    )
    tensors = model.state_dict()
    assert {name: value.data_ptr() for name, value in update.values.items()} == {
        name: tensor.data_ptr() for name, tensor in tensors.items() if tensor.is_floating_point()
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"6.bias": torch.zeros(1)}, "size mismatch for 6.bias"), ({"7.bias": torch.zeros(3)}, "7.bias")],
)
def test_tensors_of_another_network_are_not_loaded(changed, message):
    model = network()
    state = initial_state(model, FedAvg(), 1)
    with pytest.raises(RuntimeError, match=message):
        load_state(model, replace(state, shared={**state.shared, **changed}), None)


def test_what_a_client_reports():
    state = initial_state(network(), FedAvg(), 1)
    update = train_client(network(), state, THREE[1], FedAvg(), Classify(), settings(local_epochs=3), local=None)
    assert update.images == 18
    assert update.seconds > 0
    total, count = update.metrics["light"]["loss"]
    assert count == 18.0
    assert 0.5 < total / count < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_forward": 0}, "images_per_forward must be 1 or more, got 0"),
        ({"local_epochs": 0}, "local_epochs must be 1 or more, got 0"),
        ({"images_per_forward": 3}, "images_per_step=4 must be a multiple of images_per_forward=3"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_clients_use_plain_sgd_unless_told_otherwise():
    made = ClientSettings(images_per_forward=1, images_per_step=1, image_size=8, statistics=STATISTICS).optimizer
    assert (made.name, made.momentum, made.weight_decay, made.schedule, made.warmup) == (
        "sgd",
        0.0,
        0.0,
        "constant",
        0.0,
    )
