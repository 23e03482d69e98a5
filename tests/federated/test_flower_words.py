"""`batchless federate --engine flower` as words: all but SuperLink and SuperNodes, in whose place a grid in this process is."""

import os
import signal
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from domain_runs import assert_same, flat, write_domains
from flower_grid import InProcessGrid, comparable, sites
from flwr.app import Context, Message, RecordDict

from batchless.cli import main
from batchless.federated import loopback
from batchless.federated.flower import server_app
from batchless.federated.flower_settings import run_name
from batchless.runs import read_run

CLIENTS = 2


class KilledError(BaseException):
    """Stands for a server that is gone."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


def words(root: Path, out: Path, engine: str) -> list[str]:
    given = {
        "algorithm": "fedbn",
        "engine": engine,
        "rounds": 3,
        "evaluate_every": 3,
        "workers": 1,
        "images_per_step": 4,
        "tensorboard": "false",
        "out": out,
        "data.root": root,
        "data.domains": "[pale, plain]",
        "data.image_size": 8,
        "data.crop_padding": 1,
    }
    return ["federate", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def flower(monkeypatch) -> dict[str, Any]:
    """What `flwr run` submits is run at once, until the message that `dies` says true of; then Ctrl-C is pressed."""
    told: dict[str, Any] = {"dies": lambda message: False, "submitted": []}

    def submit(home: Path, verb: str, app: str, connection: str) -> dict[str, Any]:
        assert verb == "run"
        written = tomllib.loads(Path(app, "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        settings = {name[1:].replace("/", "."): value for name, value in flat(written).items()}
        told["submitted"].append(settings)

        def change(message: Message, reply: Message) -> Message:
            if told["dies"](message):
                raise KilledError
            return reply

        grid = InProcessGrid(sites(home / "disks", clients=CLIENTS), change=change)
        try:
            server_app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings))
        except KilledError:
            os.kill(os.getpid(), signal.SIGINT)
        return {"success": True}

    monkeypatch.setattr(loopback, "_started", lambda home, hosted, ending: [])
    monkeypatch.setattr(loopback, "_flwr", submit)
    return told


def of_round(number: int) -> Callable[[Message], bool]:
    return lambda message: message.metadata.message_type == "train" and message.metadata.group_id == str(number)


def test_run_stop_and_resume(root, tmp_path, flower, capsys):
    run = tmp_path / "run"
    flower["dies"] = of_round(3)
    assert main(words(root, run, "flower")) == 130
    assert capsys.readouterr().err.endswith(f"all saved; go on with: batchless federate --resume {run}\n")
    assert [line["round"] for line in read_run(run).metrics if line["kind"] == "round"] == [1, 2]
    flower["dies"] = of_round(0)
    moved = root.rename(tmp_path / "elsewhere")
    try:
        assert main(["federate", "--resume", str(run), "--data.root", str(moved)]) == 0
        assert main(words(moved, tmp_path / "alone", "processes")) == 0
    finally:
        moved.rename(root)
    assert "Test accuracy" in capsys.readouterr().out
    assert [settings["resume"] for settings in flower["submitted"]] == [False, True]
    assert_same(comparable(tmp_path / "alone"), comparable(run, run / "flower" / "disks"))
    assert main(["federate", "--resume", str(run)]) == 2
    assert "has ended: there is nothing to go on with" in capsys.readouterr().err


def test_a_run_that_has_failed_goes_on(root, tmp_path, monkeypatch, flower, capsys):
    """Its summary, which says so, is taken away when the server begins: that is not the end of the run."""
    run, serve = tmp_path / "run", loopback._flwr

    def fail(*words: str) -> dict[str, Any]:
        serve(*words)
        (run / "summary.json").write_text('{"failed": "the disk is full"}')
        return {"success": True}

    flower["dies"] = of_round(2)
    with monkeypatch.context() as patch:
        patch.setattr(loopback, "_flwr", fail)
        assert main(words(root, run, "flower")) == 2
    assert capsys.readouterr().err == "batchless: the disk is full\n"
    flower["dies"] = of_round(0)
    finished: list[threading.Thread] = []

    def slowly(*words: str) -> dict[str, Any]:
        """The server begins while its summary is being waited for."""
        (run / "summary.json").unlink()
        finished.append(threading.Timer(2.0, serve, words))
        finished[0].start()
        return {"success": True}

    monkeypatch.setattr(loopback, "_flwr", slowly)
    assert main(["federate", "--resume", str(run)]) == 0
    finished[0].join()
    assert read_run(run).summary["rounds"] == 3


def test_stopped_before_the_run_began(root, tmp_path, monkeypatch, flower, capsys):
    monkeypatch.setattr(loopback, "_flwr", lambda *words: os.kill(os.getpid(), signal.SIGINT))
    assert main(words(root, tmp_path / "run", "flower")) == 130
    said = f"batchless: stopped before the run began: there is no run in {tmp_path / 'run'} to go on with\n"
    assert capsys.readouterr().err == said
    monkeypatch.undo()
    run_name(tmp_path / "run")  # as a server leaves it that was stopped then
    assert main(words(root, tmp_path / "run", "processes")) == 0


def test_what_flower_has_started_ends_with_it():
    """A SuperLink's server app lives in a session of its own."""
    process = subprocess.Popen(["bash", "-c", "setsid sleep 600 & wait"], start_new_session=True)
    while not (below := loopback._started_by(process.pid)):
        time.sleep(0.01)
    loopback._end(process)
    assert process.returncode == -signal.SIGTERM
    (pid,) = below
    while running(pid):  # a moment, until the kernel has done it
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
