"""Algorithms as values: names, ranges, what belongs to FedWon."""

import dataclasses

import pytest

from batchless.federated.algorithms import (
    ALGORITHMS,
    Centralized,
    FedAvg,
    FedBN,
    FedProx,
    FedWon,
    FixBN,
    Standalone,
    default_clipping,
    parse_algorithm,
    resolve_normalizer,
)
from batchless.federated.server_optimizers import Average, FedAdam, FedAvgM, FedYogi


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_every_algorithm_is_a_value_found_by_its_name(kind):
    made = parse_algorithm(kind.name, weighting="equal")
    assert made == kind(weighting="equal")
    assert hash(made) == hash(kind(weighting="equal"))
    assert made != parse_algorithm(kind.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.weighting = "images"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fedporx", {}, r"unknown algorithm 'fedporx': there are fedavg, .*\(did you mean fedprox\?\)"),
        ("fedprox", {"weight": 1.0}, r"fedprox has no setting 'weight': it has .*, mu \(did you mean weighting\?\)"),
        ("fedprox", {"mu": -0.1}, "mu must be from 0 to inf, got -0.1"),
        ("fedprox", {"mu": float("inf")}, "mu must be from 0 to inf, got inf"),
        ("fedprox", {"mu": float("nan")}, "mu must be from 0 to inf, got nan"),
        ("fixbn", {"freeze_after": 1.5}, "freeze_after must be from 0 to 1, got 1.5"),
        ("fedbn", {"unseen": "median"}, "unseen must be reestimate or mean, got 'median'"),
        ("fedavg", {"weighting": "size"}, "weighting must be images or equal, got 'size'"),
        ("fedavg", {"server": "fedadan"}, r"unknown server optimizer 'fedadan': .*\(did you mean fedadam\?\)"),
        ("fedavg", {"server": {"name": "fedavgm", "momentum": 1.0}}, r"momentum must be in \[0, 1\), got 1.0"),
        ("fedavg", {"server": {"name": "fedadam", "tau": 0.0}}, "tau must be above 0, got 0.0"),
        ("fedavg", {"server": {"name": "fedyogi", "learning_rate": -1}}, "learning_rate must be above 0, got -1"),
        (
            "standalone",
            {"server": "fedadam"},
            "standalone averages nothing: it has no use for the server optimizer fed",
        ),
    ],
)
def test_a_mistake_is_named_with_what_is_possible(name, settings, message):
    with pytest.raises(ValueError, match=message):
        parse_algorithm(name, **settings)


def test_server_optimizers_by_name_by_settings_or_as_they_are():
    assert parse_algorithm("fedavg").server == Average()
    assert parse_algorithm("fedbn", server="fedadam").server == FedAdam()
    assert parse_algorithm("fedavg", server={"name": "fedyogi", "tau": 0.1}).server == FedYogi(tau=0.1)
    assert parse_algorithm("fedavg", server=FedAvgM(momentum=0.5)).server == FedAvgM(momentum=0.5)


def test_fixbn_freezes_by_the_planned_rounds():
    frozen = [FixBN(freeze_after=0.5).frozen(round, planned_rounds=4) for round in range(4)]
    assert frozen == [False, False, True, True]
    assert not any(FixBN(freeze_after=1).frozen(round, planned_rounds=4) for round in range(4))
    assert all(FixBN(freeze_after=0).frozen(round, planned_rounds=4) for round in range(4))


def test_fedwon_brings_its_normalizer_and_takes_no_other():
    assert resolve_normalizer(FedWon(), None) == "none+sws"
    assert resolve_normalizer(FedWon(), "none+sws(gamma=constant)") == "none+sws(gamma=constant)"
    for other in ("bn", "gn", "none", "none+ws", "gn+sws"):
        with pytest.raises(ValueError, match=r"its normalizer is none\+sws, got .* choose fedavg"):
            resolve_normalizer(FedWon(), other)
    for algorithm in (FedAvg(), FedBN(), Standalone(), Centralized()):
        assert resolve_normalizer(algorithm, None) == "bn"
        assert resolve_normalizer(algorithm, "gn+ws") == "gn+ws"


def test_fedwon_clips_from_32_images_per_step_on():
    assert [default_clipping(FedWon(), images_per_step=n) for n in (1, 31, 32, 64)] == [None, None, 0.1, 0.1]
    assert default_clipping(FedProx(), images_per_step=64) is None
