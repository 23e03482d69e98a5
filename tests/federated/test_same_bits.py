"""The same experiment gives the same bits in one process, in two workers, and under torchrun: every algorithm.

Compared are the network, the clients' own tensors, the server optimizer, the losses and every figure of every evaluation.
"""

from pathlib import Path

import flower_grid
import pytest
import torch
from domain_runs import ALGORITHMS, assert_same, config, differing, result, script, write_domains

from batchless.federated import run_federation
from batchless.runs import load_checkpoint
from killed_runs import finish


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> Path:
    """Every algorithm in this process."""
    out = tmp_path_factory.mktemp("alone")
    for name in ALGORITHMS:
        run_federation(config(name, root, out / name))
    return out


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_workers(name, root, alone, tmp_path):
    run_federation(config(name, root, tmp_path / name, workers=2))
    assert_same(result(alone / name), result(tmp_path / name))


def test_three_workers_for_five_clients(root, alone, tmp_path):
    """More workers than two change who trains whom, and five clients are one block only."""
    run_federation(config("fedbn", root, tmp_path / "fedbn", workers=3))
    assert_same(result(alone / "fedbn"), result(tmp_path / "fedbn"))


def test_torchrun_with_two_processes(root, alone, tmp_path):
    finish(script("torchrun_worker.py", root, tmp_path, *ALGORITHMS, processes=2))
    for name in ALGORITHMS:
        assert_same(result(alone / name), result(tmp_path / name))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_flower(name, root, alone, tmp_path):
    """Flower's server app, and its client app on two nodes that each have some of the clients, without a network between."""
    clients = 1 if name == "centralized" else 9
    whole = config(name, root, tmp_path / name, engine="flower")
    flower_grid.serve(whole, flower_grid.InProcessGrid(flower_grid.sites(tmp_path / "disks", clients=clients)))
    ours = flower_grid.comparable(tmp_path / name, tmp_path / "disks")
    assert_same(flower_grid.comparable(alone / name), ours)


def test_the_comparison_sees_what_differs(root, alone, tmp_path):
    """Algorithms differ from each other, seeds too: equal bits above are not those of runs that do nothing."""
    run_federation(config("fedavg", root, tmp_path / "seed", seed=1))
    results = {name: result(alone / name) for name in ALGORITHMS} | {"seed": result(tmp_path / "seed")}
    fedavg = results["fedavg"]
    for name in ("fedprox", "fixbn", "centralized", "fedadam", "seed"):
        other = results[name]
        assert any(
            "/checkpoint/model/" in key for key in differing({k: fedavg[k] for k in fedavg if k in other}, other)
        )
    start = load_checkpoint(alone / "fedbn" / "checkpoints" / "last.pt")["training"]["initial"]
    gains = [name for name in start if name.endswith("bn1.weight")]
    assert gains
    assert all(not torch.equal(start[name], results["fedbn"][f"/checkpoint/locals/0/{name}"]) for name in gains)
