"""What goes wrong with clients that are elsewhere, and how a run goes on: Flower's apps on a grid in this process."""

import logging
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from domain_runs import assert_same, config, result, write_domains
from flower_grid import InProcessGrid, comparable, serve, sites
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from batchless.federated import FederateConfig, FederatedDataSettings, loopback, resume_federation, run_federation
from batchless.federated.config import FlowerSettings
from batchless.federated.flower_app import write_app
from batchless.federated.state import client_checkpoint
from batchless.runs import read_run

AT_ONCE = FlowerSettings(round_timeout=0.0, connect_timeout=0.0)
Change = Callable[[Message, Message], Message | None]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


def small(name: str, root: Path, out: Path, **changes: Any) -> FederateConfig:
    """Two clients on a node each, one in a domain."""
    data = {"domains": ("pale", "plain")} | changes.pop("data", {})
    given = {"clients_per_domain": 1, "engine": "flower", "evaluate_every": 2, "data": data, "flower": AT_ONCE}
    return config(name, root, out, **given | {"fraction": 1.0} | changes)


def of_client_1(kind: str, change: Change) -> Change:
    """Spoil client 1's replies to messages of that kind in round 1."""

    def spoil(message: Message, reply: Message) -> Message | None:
        metadata = message.metadata
        hit = metadata.dst_node_id == 101 and metadata.message_type == kind and metadata.group_id == "1"
        return change(message, reply) if hit else reply

    return spoil


def with_array(array: np.ndarray, *, name: str = "conv1.weight") -> Change:
    def change(message: Message, reply: Message) -> Message:
        record = reply.content["update/1"]
        assert name in record
        record[name] = Array(array)
        return reply

    return change


def with_text(name: str, text: str) -> Change:
    def change(message: Message, reply: Message) -> Message:
        reply.content[name] = ConfigRecord({"text": text})
        return reply

    return change


def without(name: str) -> Change:
    def change(message: Message, reply: Message) -> Message:
        del reply.content[name]
        return reply

    return change


def pickled(message: Message, reply: Message) -> Message:
    reply.content["update/1"]["conv1.weight"] = Array("float32", (16, 3, 3, 3), "pickle", b"\x80\x04cos\nsystem\n.")
    return reply


SPOILED: dict[str, tuple[Change, str]] = {
    "nan": (with_array(np.full((16, 3, 3, 3), np.nan, np.float32)), "became NaN or infinite"),
    "shape": (with_array(np.zeros((3, 3), np.float32)), "conv1.weight has the shape (3, 3), here it is (16, 3, 3, 3)"),
    "type": (with_array(np.zeros((16, 3, 3, 3), np.complex64)), "conv1.weight has the type complex64"),
    "pickle": (pickled, "conv1.weight is no array"),
    "names": (lambda message, reply: _renamed(reply), "sent no conv1.weight"),
    "no arrays": (without("update/1"), "sent a message without update/1"),
    "no answer": (without("answer/1"), "sent a message without answer/1"),
    "nonsense": (with_text("answer/1", "{"), "sent an answer that cannot be read"),
    "weight": (with_text("answer/1", '{"weight": -1, "images": 1, "seconds": 1, "metrics": {"loss": [1, 1]}, '
               '"began_anew": false}'), "sent the weight -1.0: it must be above 0"),
    "late": (lambda message, reply: None, "did not answer within 0 seconds"),
    "dead": (
        lambda message, reply: Message(Error(code=5, reason="Node\nUnavailable"), reply_to=message),
        "its node reports: Node Unavailable",
    ),
    "error": (with_text("error", "ValueError: the disk is full"), "ValueError: the disk is full"),
    "own words": (with_text("answer/1", '{"left_out": "not\\ntoday"}'), "not today"),
}  # fmt: skip


def _renamed(reply: Message) -> Message:
    record = reply.content["update/1"]
    record["other.weight"] = record.pop("conv1.weight")
    return reply


@pytest.mark.parametrize("name", SPOILED)
def test_a_client_that_fails_is_left_out_named_and_counted(name, root, tmp_path):
    change, reason = SPOILED[name]
    grid = InProcessGrid(sites(tmp_path / "disks", clients=2), change=of_client_1("train", change))
    serve(small("fedbn", root, tmp_path / "run"), grid)
    run = read_run(tmp_path / "run")
    (line,) = [line for line in run.metrics if line["kind"] == "left_out"]
    assert (line["round"], line["client"]) == (1, 1)
    assert reason in line["reason"]
    assert "\n" not in line["reason"]
    assert run.summary["left_out"] == 1
    assert [each["left_out"] for each in run.metrics if each["kind"] == "round"] == [1, 0]


def test_too_few_clients_end_the_run_with_a_message(root, tmp_path):
    grid = InProcessGrid(sites(tmp_path / "disks", clients=2), change=of_client_1("train", SPOILED["late"][0]))
    with pytest.raises(ValueError, match=r"round 1: 1 of 2 clients left, min_clients is 2 \(client 1: did not answer"):
        serve(small("fedbn", root, tmp_path / "run", min_clients=2), grid)
    assert "did not answer" in read_run(tmp_path / "run").summary["failed"]


def test_nobody_there_ends_the_run_with_a_message(root, tmp_path):
    with pytest.raises(ValueError, match=r"round 1: 0 of 2 clients left.*no node that hosts it is connected"):
        serve(small("fedavg", root, tmp_path / "run"), InProcessGrid({}))


def test_a_node_that_is_not_connected_costs_its_clients_only(root, tmp_path):
    nodes = sites(tmp_path / "disks", clients=2)
    del nodes[101]
    serve(small("fedbn", root, tmp_path / "run"), InProcessGrid(nodes))
    run = read_run(tmp_path / "run")
    assert run.summary["left_out"] == 2
    assert set(run.summary["domains"]) == {"pale"}  # nobody has the images of the other one


def test_a_node_that_comes_back_under_another_name_takes_part_again(root, tmp_path):
    nodes = sites(tmp_path / "disks", clients=2)
    grid = InProcessGrid(nodes)

    def restart(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and 101 in nodes and message.metadata.dst_node_id == 101:
            nodes[777] = nodes.pop(101)
        return reply

    grid.change = restart
    serve(small("fedbn", root, tmp_path / "run"), grid)
    run_federation(small("fedbn", root, tmp_path / "alone", engine="processes"))
    assert_same(comparable(tmp_path / "alone"), comparable(tmp_path / "run", tmp_path / "disks"))


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written or said."""


@pytest.mark.parametrize(
    ("name", "kind", "round"),
    [
        ("fedbn", "train", 1),
        ("fedbn", "train", 2),
        ("fedbn", "evaluate", 2),
        ("fedbn", "train", 3),
        ("fedadam", "train", 2),
    ],
)
def test_killed_in_any_round_and_resumed(kind, round, name, root, tmp_path):
    """The clients have trained the round already and kept their layers; the server, killed before it knew, asks again."""
    given = {"rounds": 3, "evaluate_every": 1, "fraction": 0.5, "clients_per_domain": 2}

    def kill(message: Message, reply: Message) -> Message:
        number = int(message.metadata.group_id) - (message.metadata.message_type == "evaluate")
        if message.metadata.message_type == kind and number == round:
            raise Killed
        return reply

    nodes = sites(tmp_path / "disks", clients=4)
    with pytest.raises(Killed):
        serve(small(name, root, tmp_path / "run", **given), InProcessGrid(nodes, change=kill))
    serve(small(name, root, tmp_path / "run", **given), InProcessGrid(nodes), resume=True)
    run_federation(small(name, root, tmp_path / "alone", **given | {"engine": "processes"}))
    assert_same(comparable(tmp_path / "alone"), comparable(tmp_path / "run", tmp_path / "disks"))


def test_a_client_that_has_lost_its_disk_begins_anew_and_is_named(root, tmp_path, caplog):
    def lose(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "1":
            shutil.rmtree(tmp_path / "disks" / "node1", ignore_errors=True)
        return reply

    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(small("fedbn", root, tmp_path / "run"), InProcessGrid(sites(tmp_path / "disks", clients=2), change=lose))
    assert "round 2: client 1 had lost its own layers and began with the initial ones" in caplog.text
    assert "client 0" not in caplog.text


def test_a_damaged_disk_leaves_the_client_out(root, tmp_path):
    def damage(message: Message, reply: Message) -> Message:
        for file in (tmp_path / "disks" / "node1").glob("*/client1-round1.pt"):
            file.write_bytes(b"\x80\x04cos\nsystem\n.")
        return reply

    serve(small("fedbn", root, tmp_path / "run"), InProcessGrid(sites(tmp_path / "disks", clients=2), change=damage))
    (line,) = [line for line in read_run(tmp_path / "run").metrics if line["kind"] == "left_out"]
    assert (line["round"], line["client"]) == (2, 1)
    assert "client1-round1.pt" in line["reason"]


@pytest.mark.parametrize("name", ["fedavg", "fedbn"])
def test_each_site_has_its_own_domain_only_and_the_server_none(name, root, tmp_path):
    """The same bits again, though nobody has all the images."""
    nodes = sites(tmp_path / "disks", clients=2)
    for node, domain in ((100, "pale"), (101, "plain")):
        (tmp_path / domain).mkdir()
        shutil.copy(root / f"{domain}.npz", tmp_path / domain)
        nodes[node]["data-root"] = str(tmp_path / domain)
    run_federation(small(name, root, tmp_path / "alone", engine="processes"))
    told = {"classes": tuple(map(str, range(10)))}
    without = replace(AT_ONCE, server_has_data=False)
    serve(small(name, Path("/nowhere"), tmp_path / "run", data=told, flower=without), InProcessGrid(nodes))
    assert_same(comparable(tmp_path / "alone"), comparable(tmp_path / "run", tmp_path / "disks"))


def test_domains_without_clients_are_evaluated_by_the_server(root, tmp_path):
    data = {"unseen_domains": ("pale",)}
    given = {"clients_per_domain": 1, "fraction": 1.0, "data": data}
    run_federation(config("fedbn", root, tmp_path / "alone", **given))
    asked = config("fedbn", root, tmp_path / "run", engine="flower", **given)
    serve(asked, InProcessGrid(sites(tmp_path / "disks", clients=2)))
    assert_same(comparable(tmp_path / "alone"), comparable(tmp_path / "run", tmp_path / "disks"))


def test_an_evaluation_that_nobody_answers_ends_the_run(root, tmp_path):
    def mute(message: Message, reply: Message) -> Message | None:
        return None if message.metadata.message_type == "evaluate" else reply

    with pytest.raises(ValueError, match="evaluation after round 2: no node has answered"):
        serve(small("fedbn", root, tmp_path / "run"), InProcessGrid(sites(tmp_path / "disks", clients=2), change=mute))


def test_figures_of_others_are_not_taken(root, tmp_path):
    text = '[[0, {"accuracy": 1.0}], [1, {"accuracy": 0.25}], ["pale", {"accuracy": 1.0}]]'
    grid = InProcessGrid(sites(tmp_path / "disks", clients=2))

    def lie(message: Message, reply: Message) -> Message:
        hit = message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == 101
        return with_text("figures", text)(message, reply) if hit else reply

    grid.change = lie
    serve(small("fedbn", root, tmp_path / "run"), grid)
    domains = read_run(tmp_path / "run").summary["domains"]
    assert domains["plain"] == {"accuracy": 0.25}
    assert "loss" in domains["pale"]


def test_a_node_that_claims_nonsense_is_not_used(root, tmp_path):
    spoil = of_client_1("query", with_text("clients", '["one"]'))
    serve(small("fedavg", root, tmp_path / "run"), InProcessGrid(sites(tmp_path / "disks", clients=2), change=spoil))
    assert read_run(tmp_path / "run").summary["left_out"] == 2


def test_what_a_hostile_server_sends_is_refused(root, tmp_path):
    grid = InProcessGrid(sites(tmp_path / "disks", clients=2))
    serve(small("fedavg", root, tmp_path / "run"), grid)
    wrong = RecordDict({"round": ConfigRecord({"text": '{"run": "../../etc"}'})})
    (id,) = grid.push_messages([Message(wrong, 100, "train")])
    assert "no order of a server" in grid.pull_messages([id])[0].content["error"]["text"]


def test_a_run_over_flower_is_not_resumed_elsewhere(root, tmp_path):
    asked = small("fedbn", root, tmp_path / "run")
    with pytest.raises(ValueError, match=r"use batchless\.federated\.loopback"):
        run_federation(asked)
    serve(asked, InProcessGrid(sites(tmp_path / "disks", clients=2)))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"use batchless\.federated\.loopback"):
        resume_federation(tmp_path / "run")
    with pytest.raises(ValueError, match="client 1 keeps its layers to itself"):
        client_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", 1)
    assert "/checkpoint/locals/1/kept by the client since round" in result(tmp_path / "run")


def no_start(monkeypatch, program: str) -> None:
    """Flower's commands are that program instead."""
    monkeypatch.setattr(loopback, "_program", lambda name: program)


def test_a_superlink_that_does_not_start_is_told(root, tmp_path, monkeypatch):
    no_start(monkeypatch, "/bin/false")
    with pytest.raises(ValueError, match=r"superlink ended \(exit status 1\), see .*superlink\.log"):
        loopback.federate_on_loopback(small("fedbn", root, tmp_path / "run"))


def test_without_flower_its_package_is_named(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"needs Flower.*pip install 'batchless\[flower\]'"):
        loopback.federate_on_loopback(small("fedbn", root, tmp_path / "run"))


def test_mistakes_are_told_before_anything_starts(root, tmp_path, monkeypatch):
    no_start(monkeypatch, "/nowhere")
    run_federation(small("fedavg", root, tmp_path / "run", engine="processes", rounds=1))
    with pytest.raises(ValueError, match="already holds a run"):
        loopback.federate_on_loopback(small("fedavg", root, tmp_path / "run"))
    with pytest.raises(ValueError, match="has ended: there is nothing to go on with"):
        loopback.resume_on_loopback(tmp_path / "run")
    with pytest.raises(ValueError, match="min_clients=3, but 2 clients"):
        loopback.federate_on_loopback(small("fedavg", root, tmp_path / "other", min_clients=3))
    assert not (tmp_path / "other").exists()


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    number=st.floats(allow_nan=False),
    count=st.integers(-(2**60), 2**60),
)
def test_an_app_says_what_it_is_given(tmp_path_factory, text, number, count):
    folder = tmp_path_factory.mktemp("app")
    settings = {"text": text, "number": number, "count": count, "yes": True}
    write_app(folder, settings)
    assert tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"] == settings


def test_the_ready_app_is_what_is_written(tmp_path):
    """The folder in examples/ is that of `write_app`, with settings to change."""
    app = Path(__file__).parents[2] / "examples" / "flower_app" / "pyproject.toml"
    ready = tomllib.loads(app.read_text())
    write_app(tmp_path, {})
    written = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    settings = ready["tool"]["flwr"]["app"].pop("config")
    assert written["tool"]["flwr"]["app"].pop("config") == {}
    assert ready == written
    assert FederatedDataSettings(**settings["data"])
