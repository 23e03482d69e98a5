"""Privacy of clients: the clip bounds what one of them does, the noise is as large as it says, the accountant is Opacus'."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from domain_runs import config, write_domains
from federated_reference import clipped_mean
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from tiny_federation import client, network, one_round, same_bits, settings
from torch import Tensor, nn

from batchless.federated import run_federation
from batchless.federated.accounting import epsilon, steps_of
from batchless.federated.algorithms import Centralized, FedAvg, FedBN, FedProx, FedWon, SiloBN, Standalone
from batchless.federated.client import train_client
from batchless.federated.client_privacy import ClientNoise, change_norm, clipped, require_clipped
from batchless.federated.privacy import PrivacySettings, require_private, sampled_by_coins
from batchless.federated.server import ServerState, aggregate, initial_state
from batchless.federated.sharing import tensor_kinds, trainable_tensors
from batchless.federated.summing import RoundSum, sum_in_blocks
from batchless.federated.update import ClientFailedError, Update
from batchless.runs import read_run
from batchless.tasks import Classify

UNCLIPPED = PrivacySettings(level="client", clip_norm=1e30, noise_multiplier=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


def state_of(**tensors: Tensor) -> ServerState:
    return ServerState(shared=tensors, initial={}, planned_rounds=1)


def update_of(state: ServerState, changes: list[Tensor]) -> Update:
    """One client's, whose tensors have changed by so much."""
    values = {name: state.shared[name].double() + d for name, d in zip(state.shared, changes, strict=True)}
    return Update(weight=1.0, values=values)


# Clipping.


def test_a_change_within_the_bound_is_left_to_the_bit():
    state = state_of(a=torch.randn(4), b=torch.randn(2, 3))
    update = update_of(state, [torch.full((4,), 0.1), torch.zeros(2, 3)])
    assert clipped(update, state, clip_norm=0.3, client=0) is update


@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    bound=st.sampled_from([0.01, 1.0, 50.0]),
)
def test_one_client_changes_the_sum_by_no_more_than_the_clip(seeds, scale, bound):
    """With or without it: C. One in place of another: 2 C. Over all tensors together, buffers among them."""
    generator = torch.Generator().manual_seed(seeds[0])
    state = state_of(weight=torch.randn(3, 4, generator=generator), running=torch.randn(5, generator=generator))
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        changes = [scale * torch.randn(value.shape, generator=generator) for value in state.shared.values()]
        found.append(clipped(update_of(state, changes), state, clip_norm=bound, client=seed))
        assert change_norm(found[-1].values, state) <= bound * (1 + 1e-9)
        require_clipped(found[-1], state, clip_norm=bound, client=seed)

    def noiseless(updates: list[Update]) -> Tensor:
        noise = ClientNoise(privacy=replace(UNCLIPPED, clip_norm=bound), expected_clients=1.0, seed=0)
        means = noise.mean(sum_in_blocks(updates), state)
        return torch.cat([(means[name] - state.shared[name].double()).flatten() for name in means])

    whole = noiseless(found)
    for left in range(len(found)):
        rest = noiseless([*found[:left], *found[left + 1 :]])
        assert float((whole - rest).norm()) <= bound * (1 + 1e-6)
        other = noiseless([*found[:left], found[0], *found[left + 1 :]])
        assert float((whole - other).norm()) <= 2 * bound * (1 + 1e-6)


def test_the_mean_is_the_papers_formula():
    """Four clients, of which two are over the bound, 2.5 expected: against loops over Python's numbers."""
    generator = torch.Generator().manual_seed(0)
    state = state_of(weight=torch.randn(2, 3, generator=generator), bias=torch.randn(3, generator=generator))
    changes = [[f * torch.randn(v.shape, generator=generator) for v in state.shared.values()] for f in (0.1, 5, 0.2, 9)]
    updates = [clipped(update_of(state, each), state, clip_norm=1.0, client=i) for i, each in enumerate(changes)]
    noise = ClientNoise(privacy=replace(UNCLIPPED, clip_norm=1.0), expected_clients=2.5, seed=0)
    means = noise.mean(sum_in_blocks(updates), state)
    start = torch.cat([value.flatten() for value in state.shared.values()]).tolist()
    flat = [torch.cat([d.flatten() for d in each]).tolist() for each in changes]
    expected = clipped_mean(start, flat, clip_norm=1.0, expected_clients=2.5)
    found = torch.cat([means[name].flatten() for name in state.shared]).tolist()
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_without_noise_and_bound_it_is_fedavg_with_equal_weights():
    model, algorithm = network("gn"), FedAvg(weighting="equal")
    clients = (client(0, 4), client(1, 9), client(2, 6))
    state = initial_state(model, algorithm, 4)
    plain = one_round(algorithm, model, clients, state, {})
    private = one_round(algorithm, model, clients, state, {}, privacy=UNCLIPPED)
    assert same_bits(plain.sums, private.sums)
    noise = ClientNoise(privacy=UNCLIPPED, expected_clients=3.0, seed=0)
    kinds, trainable = tensor_kinds(model), trainable_tensors(model)
    expected = aggregate(plain, state, algorithm, kinds, trainable).shared
    found = aggregate(private, state, algorithm, kinds, trainable, means=noise.mean(private, state)).shared
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_a_clients_whole_change_is_clipped():
    model, algorithm = network("gn"), FedAvg(weighting="equal")
    state = initial_state(model, algorithm, 4)
    made = settings(privacy=PrivacySettings(level="client", clip_norm=1e-3))
    update = train_client(model, state, client(0), algorithm, Classify(), made, local=None)
    assert change_norm(update.values, state) == pytest.approx(1e-3, rel=1e-9)
    free = train_client(network("gn"), state, client(0), algorithm, Classify(), settings(), local=None)
    direction = [
        torch.cat([(value.double() - state.shared[name]).flatten() for name, value in each.values.items()])
        for each in (update, free)
    ]
    torch.testing.assert_close(direction[0] / 1e-3, direction[1] / direction[1].norm(), rtol=1e-7, atol=1e-9)


def test_integers_that_change_are_not_let_through():
    state = state_of(weight=torch.zeros(2), counts=torch.tensor(3))
    update = replace(update_of(state_of(weight=torch.zeros(2)), [torch.ones(2)]), counters={"counts": torch.tensor(4)})
    with pytest.raises(ClientFailedError, match="counts counts something"):
        clipped(update, state, clip_norm=1.0, client=0)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (Update(weight=2.0, values={"w": torch.ones(2).double()}), "weight 2"),
        (Update(weight=1.0, values={"w": torch.ones(2).double()}), "norm 1.41421, privacy.clip_norm is 1"),
    ],
)
def test_an_unclipped_update_from_elsewhere_is_refused(update, message):
    with pytest.raises(ClientFailedError, match=message):
        require_clipped(update, state_of(w=torch.zeros(2)), clip_norm=1.0, client=0)


# Noise.


def test_the_noise_has_the_deviation_that_was_asked_for():
    """sigma * C / (q N) of every tensor, 0 on average, whoever came; the same in the same round, another one in the next."""
    privacy = PrivacySettings(level="client", clip_norm=0.5, noise_multiplier=3.0)
    state = state_of(big=torch.zeros(200, 200), small=torch.zeros(1000))
    noise = ClientNoise(privacy=privacy, expected_clients=4.0, seed=7)
    nobody = noise.mean(RoundSum(), state)
    std = 3.0 * 0.5 / 4.0
    for value in nobody.values():
        n = value.numel()
        assert float(value.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * n))
        assert abs(float(value.mean())) < 4 * std / math.sqrt(n)
    somebody = noise.mean(sum_in_blocks([update_of(state, [torch.zeros(200, 200), torch.zeros(1000)])]), state)
    assert same_bits(nobody, somebody)
    later = noise.mean(RoundSum(), replace(state, round=1))
    both = torch.stack([nobody["big"].flatten(), later["big"].flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([v.flatten()[:1000] for v in nobody.values()]))[0, 1])) < 0.15


def test_a_secret_file_makes_other_noise_than_the_seed(tmp_path):
    secrets = []
    for i in range(2):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 32)
        secrets.append(PrivacySettings(level="client", seed_file=str(tmp_path / str(i))))
    drawn = [p.generator("noise", 0, seed=0).standard_normal() for p in (*secrets, PrivacySettings(), secrets[0])]
    assert len(set(drawn)) == 3
    assert drawn[3] == drawn[0]
    assert secrets[0].generator("noise", 0, seed=1).standard_normal() == drawn[0]


def test_a_secret_that_is_none_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"1234")
    for name, message in (
        ("short", "has 4 bytes, a secret has 16 or more"),
        ("absent", "cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            PrivacySettings(seed_file=str(tmp_path / name)).generator(seed=0)


def test_coins_are_independent_and_fair():
    privacy = PrivacySettings(level="client")
    drawn = [
        sampled_by_coins(20, probability=0.25, generator=privacy.generator("clients", r, seed=0)) for r in range(2000)
    ]
    sizes = torch.tensor([float(len(each)) for each in drawn])
    assert float(sizes.mean()) == pytest.approx(5.0, abs=4 * math.sqrt(20 * 0.25 * 0.75 / 2000))
    assert float(sizes.var()) == pytest.approx(20 * 0.25 * 0.75, rel=0.15)  # of a fixed number it would be 0
    assert min(sizes) == 0
    for one in range(20):
        assert sum(one in each for each in drawn) == pytest.approx(500, abs=4 * math.sqrt(2000 * 0.25 * 0.75))


# The accountant.


@pytest.mark.parametrize(("q", "sigma", "rounds"), [(1.0, 2.0, 3), (0.1, 1.0, 20), (0.5, 0.7, 1)])
def test_epsilon_is_opacus(q, sigma, rounds):
    accountant = RDPAccountant()
    for _ in range(rounds):
        accountant.step(noise_multiplier=sigma, sample_rate=q)
    privacy = PrivacySettings(level="client", noise_multiplier=sigma, delta=1e-6)
    assert epsilon(privacy, [(q, rounds)]) == pytest.approx(accountant.get_epsilon(delta=1e-6), rel=1e-9)


def test_epsilon_is_that_of_the_most_used():
    privacy = PrivacySettings(level="sample")
    each = [epsilon(privacy, [use]) for use in ((0.1, 10), (0.1, 20), (0.5, 10))]
    assert each == sorted(each)
    assert epsilon(privacy, [(0.1, 10), (0.5, 10), (0.1, 20)]) == each[2]
    assert epsilon(privacy, []) == 0.0
    assert epsilon(PrivacySettings(noise_multiplier=0.0), [(0.1, 10)]) is None


def test_full_participation_is_the_gaussian_mechanism():
    """One release with sigma = 5: from alpha / (2 sigma^2) at the best order, by Opacus' conversion, in plain floats."""
    orders = RDPAccountant.DEFAULT_ALPHAS
    delta, sigma = 1e-5, 5.0
    by_order = [
        a / (2 * sigma**2) - (math.log(delta) + math.log(a)) / (a - 1) + math.log((a - 1) / a) for a in orders if a > 1
    ]
    assert epsilon(PrivacySettings(noise_multiplier=sigma, delta=delta), [(1.0, 1)]) == pytest.approx(min(by_order))


@pytest.mark.parametrize(("images", "size", "expected"), [(10, 5, (0.5, 2)), (11, 5, (5 / 11, 3)), (3, 5, (1.0, 1))])
def test_steps_of_an_epoch(images, size, expected):
    assert steps_of(images, images_per_step=size) == expected


# What is refused.


class Mixing(nn.Module):
    """A normalization of batches without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)


@pytest.mark.parametrize("level", ["client", "sample"])
def test_networks_that_mix_images_are_refused(level):
    privacy = PrivacySettings(level=level)
    for name in ("bn", "sync-bn", "bcn", "bcn-micro", "frozen-bn", "bcn-micro+ws"):
        with pytest.raises(ValueError, match=rf"privacy.level={level}: .* mix them without noise; choose .*fedwon"):
            require_private(privacy, FedAvg(), network(name))
    with pytest.raises(ValueError, match=r"norm \(BatchNorm2d\) computes with statistics"):
        require_private(privacy, FedAvg(), Mixing())
    for name in ("gn", "ln", "in", "none", "none+sws", "gn+ws"):
        require_private(privacy, FedWon(), network(name))


def test_algorithms_that_let_out_local_layers_are_refused():
    clients, images = PrivacySettings(level="client"), PrivacySettings(level="sample")
    for algorithm in (FedBN(), SiloBN(), Standalone(), Centralized()):
        with pytest.raises(ValueError, match=f"privacy.level=client: {algorithm.name}"):
            require_private(clients, algorithm, network("gn"))
        require_private(images, algorithm, network("gn"))
    require_private(clients, FedProx(), network("gn"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": "clients"}, "privacy.level must be none, client or sample"),
        ({"clip_norm": 0.0}, "privacy.clip_norm must be above 0"),
        ({"clip_norm": math.inf}, "privacy.clip_norm must be above 0 and finite"),
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier must be 0 or more"),
        ({"delta": 1.0}, "privacy.delta must be above 0 and below 1"),
    ],
)
def test_settings_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        PrivacySettings(**given)


def test_a_run_is_refused_before_anything_is_written(root, tmp_path):
    with pytest.raises(ValueError, match="bn1"):
        run_federation(config("fedavg", root, tmp_path / "run", privacy=PrivacySettings(level="client")))
    assert not (tmp_path / "run").exists()


def test_a_server_without_data_cannot_account_for_images(root, tmp_path):
    from batchless.federated.config import FlowerSettings

    with pytest.raises(ValueError, match="accounts by how many images"):
        config(
            "fedwon",
            root,
            tmp_path,
            engine="flower",
            flower=FlowerSettings(server_has_data=False),
            privacy=PrivacySettings(level="sample"),
        )


# Whole runs.


def test_each_round_says_what_was_spent(root, tmp_path):
    asked = config("private clients", root, tmp_path / "run", rounds=3, evaluate_every=3)
    finished = run_federation(asked)
    rounds = [line for line in read_run(tmp_path / "run").metrics if line["kind"] == "round"]
    accountant = RDPAccountant()
    for line in rounds:
        accountant.step(noise_multiplier=0.5, sample_rate=0.6)
        assert line["epsilon"] == pytest.approx(accountant.get_epsilon(delta=1e-5))
        assert line["delta"] == 1e-5
    assert finished.summary["epsilon"] == rounds[-1]["epsilon"]
    assert "clients weigh the same" in finished.explanation
    assert "each one's change clipped to 0.1, noise 0.05 on the sum, divided by 5.4" in finished.explanation


def test_a_round_that_nobody_comes_to_is_noise_alone(root, tmp_path):
    privacy = PrivacySettings(level="client", clip_norm=1e-3, noise_multiplier=1e-3)
    asked = config("private clients", root, tmp_path / "run", rounds=2, fraction=0.01, privacy=privacy)
    finished = run_federation(asked)
    lines = [line for line in read_run(tmp_path / "run").metrics if line["kind"] == "round"]
    assert [line["images"] for line in lines] == [0, 0]
    assert "loss" not in lines[0]
    assert finished.summary["rounds"] == 2
    assert finished.summary["left_out"] == 0
