"""The server's step: means, server optimizers, and what it does not take."""

import pytest
import torch
from federated_reference import server_adaptive, server_momentum, weighted_mean
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import network, same_bits
from torch import Tensor, nn

from batchless.federated.algorithms import FedAvg, FedBN, SiloBN, Standalone
from batchless.federated.server import ServerState, aggregate, initial_state, require_usable
from batchless.federated.server_optimizers import Average, FedAdam, FedAvgM, FedYogi
from batchless.federated.sharing import tensor_kinds, trainable_tensors
from batchless.federated.summing import PIECE, sum_in_blocks
from batchless.federated.update import ClientFailedError, Update, failed

SERVERS = (FedAvgM(), FedAdam(), FedYogi())


def of(tensors: dict[str, Tensor], *, weight: float = 1.0) -> Update:
    """The update of a client that has trained to `tensors`."""
    return Update(
        weight=weight,
        values={name: value for name, value in tensors.items() if value.is_floating_point()},
        counters={name: value for name, value in tensors.items() if not value.is_floating_point()},
    )


def trained(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The tensors of `model` moved at random, as by training; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        moved[name] = value + seed if not value.is_floating_point() else (value + 0.1 * noise)
        if name.endswith("running_var"):
            moved[name] = moved[name].abs() + 0.01
    return moved


def after(model: nn.Module, algorithm: FedAvg, *updates: Update, rounds: int = 1) -> ServerState:
    state = initial_state(model, algorithm, rounds)
    for _ in range(rounds):
        state = aggregate(sum_in_blocks(updates), state, algorithm, tensor_kinds(model), trainable_tensors(model))
    return state


def test_the_mean_is_the_formula_with_buffers():
    model = network()
    clients = [trained(model, seed) for seed in (1, 2, 3)]
    weights = [5.0, 1.0, 17.0]
    state = after(model, FedAvg(), *(of(c, weight=w) for c, w in zip(clients, weights, strict=True)))
    for name, value in state.shared.items():
        if value.is_floating_point():
            assert torch.equal(value, weighted_mean([c[name] for c in clients], weights).float()), name
        else:
            assert value.dtype == torch.int64
            assert value == max(c[name] for c in clients)
    assert "1.running_var" in state.shared
    assert (state.round, state.planned_rounds, state.initial) == (1, 1, {})


@given(st.integers(1, 2**20), st.integers(1, 9), st.integers(0, 99))
def test_equal_clients_and_a_single_one_give_their_own_bits(weight, clients, seed):
    model = network(seed=seed % 5)
    tensors = trained(model, seed)
    updates = [of(tensors, weight=weight + 3 * position) for position in range(clients)]
    assert same_bits(after(model, FedAvg(), *updates).shared, tensors)


def test_fedavgm_without_momentum_at_rate_1_is_fedavg():
    model = network()
    updates = [of(trained(model, seed), weight=seed) for seed in (1, 2, 3)]
    plain = after(model, FedAvg(), *updates, rounds=3)
    momentum = after(model, FedAvg(server=FedAvgM(momentum=0, learning_rate=1)), *updates, rounds=3)
    assert same_bits(plain.shared, momentum.shared)
    assert not same_bits(plain.shared, after(model, FedAvg(server=FedAvgM(momentum=0.5)), *updates, rounds=3).shared)
    # A mean far below the value, of which x + (mean - x) keeps a few digits only.
    server, value, mean = FedAvgM(momentum=0, learning_rate=1), torch.ones(1), torch.tensor([1e-9], dtype=torch.float64)
    assert torch.equal(server.step(value, mean, {})[0], mean)
    assert not torch.equal(value + (mean - value), mean)


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=5),
    st.floats(-2, 2),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([1e-3, 0.1]),
)
def test_server_optimizers_are_their_formulas(means, start, beta, tau):
    values = {"learning_rate": 0.3, "beta1": beta, "beta2": 0.8, "tau": tau}
    for optimizer, expected in (
        (FedAvgM(learning_rate=0.7, momentum=beta), server_momentum(start, means, learning_rate=0.7, momentum=beta)),
        (FedAdam(**values), server_adaptive(start, means, yogi=False, **values)),
        (FedYogi(**values), server_adaptive(start, means, yogi=True, **values)),
    ):
        state = ServerState(
            shared={"w": torch.tensor([start], dtype=torch.float64)}, initial={}, planned_rounds=len(means)
        )
        for mean in means:
            update = of({"w": torch.tensor([mean], dtype=torch.float64)})
            state = aggregate(sum_in_blocks([update]), state, FedAvg(server=optimizer), {"w": "weight"}, {"w"})
        assert float(state.shared["w"]) == pytest.approx(expected, rel=1e-9, abs=1e-12), optimizer


@pytest.mark.parametrize("server", [Average(), *SERVERS])
def test_large_tensors_step_in_pieces_to_the_same_bits(server):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(PIECE // 2 + 1, 3, generator=generator)
    state = ServerState(shared={"w": before.t().contiguous().t()}, initial={}, planned_rounds=2)
    value, moments = before, {}
    for _ in range(2):
        given = torch.randn(before.shape, generator=generator)
        total = sum_in_blocks([of({"w": given}, weight=3), of({"w": value}, weight=4)])
        state = aggregate(total, state, FedAvg(server=server), {"w": "weight"}, {"w"})
        stepped, moments = server.step(value, (given.double() * 3 + value.double() * 4) / 7, moments)
        value, moments = stepped.float(), {key: moment.float().double() for key, moment in moments.items()}
        assert torch.equal(state.shared["w"], value)
        assert same_bits({k: m.double() for k, m in state.server_optimizer.get("w", {}).items()}, moments)


@pytest.mark.parametrize("server", SERVERS)
def test_server_optimizers_leave_buffers_to_the_mean(server):
    model = network()
    tensors = trained(model, 1)
    state = after(model, FedAvg(server=server), of(tensors), rounds=2)
    trainable = trainable_tensors(model)
    for name, value in state.shared.items():
        if name not in trainable:
            assert torch.equal(value, tensors[name]), name
    assert state.server_optimizer.keys() == trainable
    assert any(not torch.equal(state.shared[name], tensors[name]) for name in trainable)


def test_fedadam_on_a_running_variance_would_make_it_negative():
    """The mistake that others ship, and that the variance here does not go through."""
    server = FedAdam(learning_rate=0.1)
    before, mean = torch.tensor([0.05]), torch.tensor([0.01])
    wrong, _ = server.step(before.double(), mean.double(), {})
    assert float(wrong) < 0
    model = nn.BatchNorm1d(1)
    model.running_var.copy_(before)
    state = after(model, FedAvg(server=server), of({**model.state_dict(), "running_var": mean}))
    assert torch.equal(state.shared["running_var"], mean)


def test_a_frozen_parameter_is_averaged_too():
    model = network()
    model[0].requires_grad_(False)
    tensors = trained(model, 4)
    state = after(model, FedAvg(server=FedAdam()), of(tensors))
    assert torch.equal(state.shared["0.weight"], tensors["0.weight"])


def test_nothing_is_changed_in_place():
    model = network()
    algorithm = FedAvg(server=FedAdam())
    state = initial_state(model, algorithm, 2)
    update = sum_in_blocks([of(trained(model, 1), weight=3)])
    first = aggregate(update, state, algorithm, tensor_kinds(model), trainable_tensors(model))
    kept = {name: value.clone() for name, value in first.shared.items()}
    moments = {name: {key: m.clone() for key, m in named.items()} for name, named in first.server_optimizer.items()}
    aggregate(update, first, algorithm, tensor_kinds(model), trainable_tensors(model))
    assert same_bits(first.shared, kept)
    assert all(same_bits(first.server_optimizer[name], moments[name]) for name in moments)
    assert same_bits(state.shared, model.state_dict())
    assert same_bits(update.sums, sum_in_blocks([of(trained(model, 1), weight=3)]).sums)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert same_bits(kept, first.shared), "the state holds copies"


@pytest.mark.parametrize("algorithm", [FedAvg(), SiloBN(), FedBN(), Standalone()])
def test_the_state_is_the_whole_network_in_two_parts(algorithm):
    model = network("bcn-micro+ws")
    state = initial_state(model, algorithm, 3)
    assert not state.shared.keys() & state.initial.keys()
    assert same_bits({name: {**state.shared, **state.initial}[name] for name in model.state_dict()}, model.state_dict())
    assert bool(state.initial) == (not isinstance(algorithm, FedAvg))
    assert bool(state.shared) == (not isinstance(algorithm, Standalone))


def test_standalone_goes_on_without_sharing():
    model = network()
    state = after(model, Standalone(), Update(weight=1.0, local={0: model.state_dict()}))
    assert (state.shared, state.round) == ({}, 1)


def test_tied_weights_stay_tied_under_a_server_optimizer():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state = after(model, FedAvg(server=FedAdam()), of({n: v + 1 for n, v in model.state_dict().items()}), rounds=2)
    assert torch.equal(state.shared["a.weight"], state.shared["b.weight"])


def test_half_precision_keeps_its_type_and_its_moments_are_wider():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    state = after(model, FedAvg(server=FedAdam()), of({n: v + 1 for n, v in model.state_dict().items()}))
    assert {value.dtype for value in state.shared.values()} == {torch.bfloat16}
    assert {m.dtype for named in state.server_optimizer.values() for m in named.values()} == {torch.float32}


def test_nobody_left_is_an_error_that_says_why():
    model = network()
    lost = [failed(ClientFailedError(client, "NaN")) for client in range(5)]
    with pytest.raises(ValueError, match=r"no client is left in round 1: .*\(client 0: NaN; .*client 2: NaN; ..\)"):
        after(model, FedAvg(), *lost)


def test_rounds_that_were_not_planned():
    with pytest.raises(ValueError, match="plan 1 round or more"):
        initial_state(network(), FedAvg(), 0)
    state = after(network(), FedAvg(), of(trained(network(), 1)))
    with pytest.raises(ValueError, match="round 2 of 1"):
        aggregate(sum_in_blocks([of(trained(network(), 1))]), state, FedAvg(), tensor_kinds(network()), set())


def spoiled(name: str, value: Tensor | None) -> Update:
    tensors = trained(network(), 1)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return of(tensors, weight=3)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (spoiled("6.bias", torch.full((3,), torch.nan)), "client 5: 6.bias became NaN or infinite: lower"),
        (spoiled("6.bias", torch.tensor([1.0, torch.inf, -torch.inf])), "6.bias became NaN or infinite"),
        (spoiled("6.bias", torch.zeros(4)), r"client 5: 6.bias has the shape \(4,\), the server's is \(3,\)"),
        (spoiled("1.num_batches_tracked", torch.zeros(2, dtype=torch.long)), r"has the shape \(2,\)"),
        (spoiled("6.bias", None), "client 5: sent no 6.bias: is its network the server's?"),
        (spoiled("7.bias", torch.zeros(3)), "client 5: sent 7.bias: is its network"),
        (of(trained(network(), 1), weight=0.0), "client 5: sent the weight 0.0"),
        (of(trained(network(), 1), weight=1e300), r"client 5: sent the weight 1e\+300: .* at most"),
        (Update(weight=1.0, values=of(network().state_dict()).values, counters=of(network().state_dict()).counters,
                local={4: {}}), "brought local tensors of client 4"),
    ],
)  # fmt: skip
def test_an_update_that_cannot_be_used_names_its_client(update, message):
    state = initial_state(network(), FedAvg(), 1)
    with pytest.raises(ClientFailedError, match=message):
        require_usable(update, state, client=5)


def test_local_tensors_are_looked_at_too():
    state = initial_state(network(), FedBN(), 1)
    shared = of({name: value for name, value in network().state_dict().items() if name in state.shared})
    good = {name: value.clone() for name, value in state.initial.items()}
    require_usable(Update(weight=1.0, values=shared.values, local={5: good}), state, client=5)
    bad = {**good, "1.running_var": torch.full((8,), torch.inf)}
    with pytest.raises(ClientFailedError, match=r"client 5: 1\.running_var became NaN or infinite"):
        require_usable(Update(weight=1.0, values=shared.values, local={5: bad}), state, client=5)


def test_values_whose_sum_alone_overflows_are_usable():
    state = ServerState(shared={"w": torch.zeros(3)}, initial={}, planned_rounds=1)
    require_usable(of({"w": torch.tensor([3e38, 3e38, -1.0])}, weight=2), state, client=0)


def test_an_infinite_memory_is_no_failure():
    model = network("bcn-micro(memory=inf)")
    assert torch.isinf(model[1].batch_norm.memory)
    state = initial_state(model, FedAvg(), 1)
    require_usable(of(model.state_dict(), weight=3), state, client=0)
    assert same_bits(after(model, FedAvg(), of(model.state_dict(), weight=3)).shared, model.state_dict())
