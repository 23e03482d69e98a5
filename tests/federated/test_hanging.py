"""A client that does not answer: left out where its process can be replaced, the end of the run under torchrun."""

import subprocess
from dataclasses import replace
from pathlib import Path

import odd_images
import pytest
from domain_runs import config, script, write_domains
from tiny_federation import images

from batchless.federated import FederateConfig, preparation, run_federation
from batchless.federated.partition import Federation
from batchless.runs import read_run
from killed_runs import environment


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


def hanging_federation(root: Path, out: Path, client: int, **changes: object) -> tuple[FederateConfig, Federation]:
    """A run of three clients, one in each domain, of which one hangs in the first round."""
    made = config("fedbn", root, out, fraction=1.0, clients_per_domain=1, client_timeout=8.0, **changes)
    federation = preparation.open_federation(made)
    hanging = odd_images.Hanging(**vars(images(6, seed=0)), unblocked=f"{out}-hangs")
    clients = list(federation.clients)
    clients[client] = replace(clients[client], train=hanging)
    return made, replace(federation, clients=tuple(clients))


def test_it_is_left_out_of_the_round_named_and_counted(root, tmp_path, monkeypatch):
    made, federation = hanging_federation(root, tmp_path / "run", 1)
    monkeypatch.setattr(preparation, "open_federation", lambda _: federation)
    run_federation(made)
    run = read_run(tmp_path / "run")
    (line,) = [line for line in run.metrics if line["kind"] == "left_out"]
    assert (line["round"], line["client"], line["reason"]) == (1, 1, "did not answer within 8 seconds")
    assert [each["left_out"] for each in run.metrics if each["kind"] == "round"] == [1, 0]
    assert run.summary["left_out"] == 1


def test_too_few_left_end_the_run(root, tmp_path, monkeypatch):
    made, federation = hanging_federation(root, tmp_path / "run", 1, min_clients=3)
    monkeypatch.setattr(preparation, "open_federation", lambda _: federation)
    message = r"round 1: 2 of 3 clients left, min_clients is 3 \(client 1: did not answer within 8 seconds\)"
    with pytest.raises(ValueError, match=message):
        run_federation(made)
    assert "did not answer" in read_run(tmp_path / "run").summary["failed"]


@pytest.mark.parametrize("client", [0, 1])
def test_a_process_of_torchrun_that_hangs_is_named_and_ends_the_run(client, root, tmp_path):
    """Client k of three is trained by process k modulo 2."""
    command = script("hanging_worker.py", root, tmp_path / "run", client, processes=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)
    assert done.returncode != 0
    said = f"process {client} was not done with client {client} after client_timeout=8 seconds"
    assert f"hanging_worker: {said}" in done.stderr
    assert said in read_run(tmp_path / "run").summary["failed"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"client_timeout": 0.0}, "client_timeout is in seconds and must be above 0, got 0.0"),
        ({"client_timeout": 5.0, "engine": "flower"}, "under flower set flower.round_timeout"),
    ],
)
def test_a_wrong_limit_is_one_clear_line(given, message):
    with pytest.raises(ValueError, match=message):
        FederateConfig(**given)
