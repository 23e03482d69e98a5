"""Federated runs that are killed, stopped or damaged, and what is left of them."""

from pathlib import Path
from typing import Any

import federate_worker
import odd_images
import pytest
import torch
from domain_runs import assert_same, config, result, saved, script, write_domains

from batchless.data.memory import TensorImages
from batchless.federated import FederateConfig, preparation, resume_federation, run_federation
from batchless.federated.rounds import RoundProgress
from batchless.runs import RunFolder, load_checkpoint, read_run
from batchless.train import TrainingStoppedError
from killed_runs import finish, kill_after


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.pt"


def whole(name: str, root: Path, folder: Path) -> dict[str, Any]:
    run_federation(config(name, root, folder, rounds=federate_worker.ROUNDS, evaluate_every=3))
    return result(folder)


@pytest.mark.parametrize("name", ["fedbn", "fedadam"])
def test_killed_at_some_round_and_resumed(name, root, tmp_path):
    """In one process. Model, server optimizer, local layers, sampler and round go on as if nothing had been."""
    folder = tmp_path / "killed"
    kill_after(script("federate_worker.py", folder, name, root), folder, saved(2))
    assert 2 <= load_checkpoint(last(folder))["round"] < federate_worker.ROUNDS
    resume_federation(folder)
    assert_same(whole(name, root, tmp_path / "whole"), result(folder))


def test_killed_with_two_workers_and_resumed_with_one(root, tmp_path):
    folder = tmp_path / "killed"
    kill_after(script("federate_worker.py", folder, "fedbn", root, 2), folder, saved(3))
    assert 3 <= load_checkpoint(last(folder))["round"] < federate_worker.ROUNDS
    resume_federation(folder, workers=1)
    assert_same(whole("fedbn", root, tmp_path / "whole"), result(folder))


def test_killed_under_torchrun_and_resumed_under_it(root, tmp_path):
    folder = tmp_path / "killed"
    kill_after(script("federate_worker.py", folder, "fedadam", root, processes=2), folder, saved(2))
    finish(script("federate_worker.py", folder, processes=2))
    assert_same(whole("fedadam", root, tmp_path / "whole"), result(folder))


def stopped(config: FederateConfig, *, after: int) -> None:
    """Asked to stop once so many clients are done."""
    done = 0

    def count(progress: RoundProgress) -> None:
        nonlocal done
        done += 1

    with pytest.raises(TrainingStoppedError):
        run_federation(config, count, should_stop=lambda: done >= after)


@pytest.mark.parametrize("after", [1, 13, 26])
@pytest.mark.parametrize("checkpoint_rounds", [1, 100])
def test_stopped_anywhere_and_resumed(after, checkpoint_rounds, root, tmp_path):
    """Nine clients and one more call a round: within the first round, the second and the third."""
    given = {"rounds": 3, "evaluate_every": 3, "checkpoint_rounds": checkpoint_rounds}
    run_federation(config("silobn", root, tmp_path / "whole", **given | {"fraction": 1.0}))
    asked = config("silobn", root, tmp_path / "stopped", **given | {"fraction": 1.0})
    stopped(asked, after=after)
    assert read_run(tmp_path / "stopped").summary is None
    resume_federation(tmp_path / "stopped")
    assert_same(result(tmp_path / "whole"), result(tmp_path / "stopped"))


def test_a_run_that_has_ended_is_not_resumed(root, tmp_path):
    run_federation(config("fedavg", root, tmp_path / "run", rounds=1))
    with pytest.raises(ValueError, match="has ended: there is nothing to go on with"):
        resume_federation(tmp_path / "run")


def test_a_run_without_a_checkpoint_starts_again(root, tmp_path):
    stopped(config("fedavg", root, tmp_path / "run"), after=12)
    last(tmp_path / "run").unlink()
    assert resume_federation(tmp_path / "run").summary["rounds"] == 2
    rounds = [line["round"] for line in read_run(tmp_path / "run").metrics if line["kind"] == "round"]
    assert rounds == [1, 2]


def test_a_failed_run_goes_on(root, tmp_path, monkeypatch):
    """All of a round's clients fail, because the disk with their images is away; it comes back."""
    asked = config("fedavg", root, tmp_path / "run", min_clients=5, data={"validation_share": 0.0})
    stopped(asked, after=12)
    opened = preparation.open_domains

    def away(root: Any, split: str, **named: Any) -> dict[str, TensorImages]:
        kind = odd_images.Unreadable if split == "train" else TensorImages
        return {name: kind(**vars(images)) for name, images in opened(root, split, **named).items()}

    monkeypatch.setattr(preparation, "open_domains", away)
    with pytest.raises(ValueError, match=r"round 2: 0 of 9 clients left, min_clients is 5 \(client 0: .*\.\.\)"):
        resume_federation(tmp_path / "run")
    assert "min_clients" in read_run(tmp_path / "run").summary["failed"]
    monkeypatch.undo()
    assert resume_federation(tmp_path / "run").summary["rounds"] == 2


def test_data_that_has_moved(tmp_path):
    root = write_domains(tmp_path / "domains")
    stopped(config("fedavg", root, tmp_path / "run"), after=12)
    moved = root.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="domains does not exist"):
        resume_federation(tmp_path / "run")
    assert resume_federation(tmp_path / "run", root=str(moved)).summary["rounds"] == 2


def test_a_full_disk_leaves_the_earlier_checkpoint(root, tmp_path, monkeypatch):
    save = RunFolder.save_checkpoint

    def full(self: RunFolder, name: str, state: dict[str, Any]) -> Path:
        if state["round"] == 2:
            raise ValueError("cannot write the checkpoint: No space left on device")
        return save(self, name, state)

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    with pytest.raises(ValueError, match="No space left on device"):
        run_federation(config("fedavg", root, tmp_path / "run", rounds=3))
    monkeypatch.undo()
    assert load_checkpoint(last(tmp_path / "run"))["round"] == 1
    resume_federation(tmp_path / "run")
    run_federation(config("fedavg", root, tmp_path / "whole", rounds=3))
    assert_same(result(tmp_path / "whole"), result(tmp_path / "run"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), r"last\.pt is not a checkpoint, or is truncated"),
        (lambda path: torch.save({"model": {}}, path), r"last\.pt: this checkpoint holds no federated run"),
        (lambda path: torch.save({"training": {"shared": {}}}, path), r"last\.pt: the checkpoint is of another run"),
        (lambda path: _another_network(path), r"last\.pt: the checkpoint is of another run \(another network"),
    ],
    ids=["truncated", "foreign", "half", "network"],
)
def test_a_damaged_checkpoint_is_one_clear_line(spoil, message, root, tmp_path):
    stopped(config("fedavg", root, tmp_path / "run"), after=12)
    spoil(last(tmp_path / "run"))
    with pytest.raises(ValueError, match=message) as raised:
        resume_federation(tmp_path / "run")
    assert "\n" not in str(raised.value)


def _another_network(path: Path) -> None:
    checkpoint = load_checkpoint(path)
    checkpoint["training"]["shared"].popitem()
    torch.save(checkpoint, path)
