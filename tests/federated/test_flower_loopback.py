"""Federated runs over a real SuperLink and two SuperNodes on this machine: processes, ports and Flower's own wire format.

Every message starts a process that imports torch, and Flower looks for messages every few seconds: a run of three rounds takes
about one minute on two idle cores, several times that on a busy machine. FedBN, which keeps layers on the clients' disks, and
FedAdam, which keeps state on the server, are in every run of the tests; the other algorithms are slow.
"""

import os
import signal
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import flower_grid
import pytest
from domain_runs import ALGORITHMS, assert_same, config, saved, script, write_domains

from batchless.federated import run_federation
from batchless.federated.config import FlowerSettings
from batchless.federated.loopback import federate_on_loopback, resume_on_loopback
from batchless.federated.rounds import RoundProgress
from batchless.runs import load_checkpoint, read_run
from killed_runs import kill_after, with_descendants

pytestmark = pytest.mark.timeout(3600)

ROUNDS = 3
IN_EVERY_RUN = ("fedbn", "fedadam")
PATIENT = FlowerSettings(connect_timeout=1200.0)
"""On a busy machine a SuperNode can take minutes to be there; nobody is to be left out because of that."""


def slow_but(fast: Collection[str], names: Iterable[str]) -> list[Any]:
    """Algorithms to test, slow ones marked."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


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


@pytest.mark.parametrize("name", slow_but(IN_EVERY_RUN, ALGORITHMS))
def test_the_same_bits(name, root, tmp_path):
    finished = federate_on_loopback(small(name, root, tmp_path / "run", engine="flower", flower=PATIENT))
    assert finished.summary["rounds"] == ROUNDS
    assert finished.summary["left_out"] == 0
    assert_same_as_in_process(name, root, tmp_path)


@pytest.mark.slow
def test_a_node_that_is_killed_costs_its_clients_only(root, tmp_path):
    """Flower notices after a minute; the evaluation at the end is of the other one's clients."""
    killed: list[int] = []

    def kill(progress: RoundProgress) -> None:
        for pid in [] if killed else with_descendants(os.getpid()):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if any(word.endswith("flower-supernode") for word in words) and any("1,3" in word for word in words):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    given = {"engine": "flower", "fraction": 1.0}
    finished = federate_on_loopback(small("fedbn", root, tmp_path / "run", **given), kill)
    assert len(killed) == 1
    assert finished.summary["rounds"] == ROUNDS
    lines = [line for line in read_run(tmp_path / "run").metrics if line["kind"] == "left_out"]
    assert {line["client"] for line in lines} == {1, 3}
    assert {line["round"] for line in lines} <= {2, 3}
    assert finished.summary["left_out"] == len(lines) >= 2


@pytest.mark.parametrize("name", slow_but(("fedbn",), IN_EVERY_RUN))
def test_killed_and_resumed(name, root, tmp_path):
    """SIGKILL of everything, the clients' processes too; what they keep is on their disks."""
    kill_after(script("flower_worker.py", tmp_path / "run", name, root), tmp_path / "run", saved(1), seconds=1800)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["round"] < ROUNDS
    resume_on_loopback(tmp_path / "run")
    assert_same_as_in_process(name, root, tmp_path)
