"""Federated runs over a real SuperLink and two SuperNodes on this machine: processes, ports and Flower's own wire format.

All are slow: every message starts a process that imports torch, and Flower looks for messages every few seconds. On two idle
cores a run of three rounds takes about one and a half minutes; on a busy machine several times that.
"""

from pathlib import Path
from typing import Any

import flower_grid
import pytest
from domain_runs import ALGORITHMS, assert_same, config, kill_after, script, write_domains

from batchless.federated import run_federation
from batchless.federated.loopback import federate_on_loopback, resume_on_loopback
from batchless.runs import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROUNDS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


def small(name: str, root: Path, out: Path, **changes: Any) -> Any:
    """Four clients in two domains, half of them in a round; the last round is evaluated."""
    data = {"domains": ("pale", "plain")}
    given = {"rounds": ROUNDS, "clients_per_domain": 2, "fraction": 0.5, "evaluate_every": ROUNDS, "data": data}
    return config(name, root, out, **given | changes)


def assert_same_as_in_process(name: str, root: Path, tmp_path: Path, **changes: Any) -> None:
    run_federation(small(name, root, tmp_path / "alone", **changes))
    disks = tmp_path / "run" / "flower" / "disks"
    assert_same(flower_grid.comparable(tmp_path / "alone"), flower_grid.comparable(tmp_path / "run", disks))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_bits(name, root, tmp_path):
    finished = federate_on_loopback(small(name, root, tmp_path / "run", engine="flower"))
    assert finished.summary["rounds"] == ROUNDS
    assert finished.summary["left_out"] == 0
    assert_same_as_in_process(name, root, tmp_path)


@pytest.mark.parametrize("name", ["fedbn", "fedadam"])
def test_killed_and_resumed(name, root, tmp_path):
    """SIGKILL of everything, the clients' processes too; what they keep is on their disks."""
    kill_after(script("flower_worker.py", tmp_path / "run", name, root), tmp_path / "run", 1, seconds=1800)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["round"] < ROUNDS
    resume_on_loopback(tmp_path / "run")
    assert_same_as_in_process(name, root, tmp_path)
