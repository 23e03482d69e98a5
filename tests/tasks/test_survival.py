"""Runs that are killed, stopped, or starved, and what is left of them."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchless.runs import RunFolder, load_checkpoint, read_run
from batchless.tasks import DataSettings, TrainConfig, classify_setup, resume_training, run_training
from batchless.train import TrainingStoppedError
from killed_runs import environment, finish, kill_after
from small_data import write_pictures

START = "import sys; from batchless.cli import main; sys.exit(main(sys.argv[1:]))"
SETTINGS = {
    "model": "cifar_resnet8",
    "normalizer": "bcn-micro+ws",
    "images": 96,
    "images_per_forward": 2,
    "images_per_step": 8,
    "evaluations": 3,
    "average": 50,
    "checkpoint_seconds": 0,
    "threads": 1,
    "tensorboard": "false",
    "data.image_size": 8,
    "data.crop_padding": 1,
    "data.flip": "true",
    "data.mixup": 0.4,
    "data.rand_augment": 1,
}


def command(folder: Path, root: Path, *, processes: int = 1, workers: int = 0) -> list[str]:
    settings = {**SETTINGS, "data.root": root, "data.workers": workers, "out": folder}
    return [*launch(processes), "train", *(f"--{name}={value}" for name, value in settings.items())]


def launch(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, "-c", START]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *torchrun, "-m", "batchless.cli"]


def has_seen(images: int) -> Callable[[Any], bool]:
    """Of a checkpoint: whether so many images were seen."""
    return lambda checkpoint: bool(checkpoint["images"] >= images)


def seen(checkpoint: Path) -> int:
    return int(load_checkpoint(checkpoint)["images"])


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.pt")
    return {f"averaged.{k}": v for k, v in checkpoint["model"].items()} | checkpoint["training"]["raw_model"]


def assert_same_end(first: Path, second: Path) -> None:
    states = state_of(first), state_of(second)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    summaries = [read_run(folder).summary for folder in (first, second)]
    for name in ("test_accuracy", "test_loss", "images"):
        assert summaries[0][name] == summaries[1][name]
    tests = [[line for line in read_run(folder).metrics if line["kind"] == "test"] for folder in (first, second)]
    assert tests[0] == tests[1]


@pytest.fixture
def pictures(tmp_path) -> Path:
    write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


def test_killed_at_random_moments_with_workers_and_augmentation(tmp_path, pictures):
    """Killed five times, at random points before its last steps (they may be over first), and resumed each time."""
    finish(command(tmp_path / "whole", pictures))
    folder = tmp_path / "killed"
    words = command(folder, pictures, workers=1)
    rng = random.Random(0)
    for images in sorted(rng.sample(range(8, 72, 8), 5)):
        kill_after(words, folder, has_seen(images))
        words = [*launch(1), "train", "--resume", str(folder)]
    finish(words)
    assert_same_end(tmp_path / "whole", folder)


def test_two_processes_killed_and_resumed(tmp_path, pictures):
    finish(command(tmp_path / "whole", pictures, processes=2))
    folder = tmp_path / "killed"
    kill_after(command(folder, pictures, processes=2), folder, has_seen(40))
    finish([*launch(2), "train", "--resume", str(folder)])
    assert_same_end(tmp_path / "whole", folder)
    # And two processes learn what one learns, up to the order of sums.
    finish(command(tmp_path / "alone", pictures))
    two, one = state_of(tmp_path / "whole"), state_of(tmp_path / "alone")
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], rtol=1e-2, atol=1e-3, msg=name)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, pictures):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, pictures), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    last = folder / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 200
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert f"batchless train --resume {folder}" in errors
    assert len(errors.strip().splitlines()) == 1
    assert read_run(folder).summary is None
    assert 0 < seen(last) < 96


def small(tmp_path: Path, pictures: Path, **changes: object) -> TrainConfig:
    data = DataSettings(root=str(pictures), image_size=8, crop_padding=0)
    values = {"images": 16, "images_per_step": 4, "evaluations": 2, "tensorboard": False, "data": data}
    return TrainConfig(out=str(tmp_path / "run"), **(values | changes))


def stopped(config: TrainConfig) -> None:
    calls = iter(range(1000))
    with pytest.raises(TrainingStoppedError):
        run_training(config, should_stop=lambda: next(calls) >= 1)


def test_a_run_that_has_ended_is_not_resumed(tmp_path, pictures):
    run_training(small(tmp_path, pictures))
    with pytest.raises(ValueError, match="has ended: there is nothing to go on with"):
        resume_training(tmp_path / "run")


def test_a_failed_run_goes_on(tmp_path, pictures, monkeypatch):
    """An image is unreadable in mid-epoch; it is repaired."""
    config = small(tmp_path, pictures)
    stopped(config)
    statistics = classify_setup.channel_statistics(classify_setup.open_images(str(pictures), "train"))
    monkeypatch.setattr(classify_setup, "channel_statistics", lambda *_, **__: statistics)
    whole = {picture: picture.read_bytes() for picture in (pictures / "train").rglob("*.png")}
    for picture, content in whole.items():
        picture.write_bytes(content[:20])
    with pytest.raises(ValueError, match=r"\d+\.png"):
        resume_training(tmp_path / "run")
    assert ".png" in read_run(tmp_path / "run").summary["failed"]
    for picture, content in whole.items():
        picture.write_bytes(content)
    assert resume_training(tmp_path / "run").summary["images"] == 16


def test_a_run_without_a_checkpoint_starts_again(tmp_path, pictures):
    config = small(tmp_path, pictures)
    stopped(config)
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink()
    resumed = resume_training(tmp_path / "run")
    assert resumed.summary["images"] == 16
    assert [line["images"] for line in read_run(tmp_path / "run").metrics if line["kind"] == "test"] == [8, 16]


def test_data_that_has_moved(tmp_path, pictures):
    stopped(small(tmp_path, pictures))
    moved = pictures.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pictures does not exist"):
        resume_training(tmp_path / "run")
    assert resume_training(tmp_path / "run", root=str(moved)).summary["images"] == 16


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), r"last\.pt is not a checkpoint, or is truncated"),
        (lambda path: torch.save({"model": {}}, path), r"last\.pt holds no training that can go on"),
        (lambda path: torch.save([1], path), r"last\.pt is not a checkpoint of a run"),
        (lambda path: torch.save({"training": {"progress": {"images": 4}}, "model": {}}, path), "of another training"),
    ],
    ids=["truncated", "foreign", "list", "half"],
)
def test_a_damaged_checkpoint_is_one_clear_line(spoil, message, tmp_path, pictures):
    stopped(small(tmp_path, pictures))
    spoil(tmp_path / "run" / "checkpoints" / "last.pt")
    with pytest.raises(ValueError, match=message) as raised:
        resume_training(tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_a_folder_in_use_by_another_process(tmp_path, pictures):
    stopped(small(tmp_path, pictures))
    hold = (
        "import sys, time; from pathlib import Path; from batchless.runs.lock import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another process \(number {holder.pid}\)"):
            resume_training(tmp_path / "run")
    finally:
        holder.kill()
        holder.communicate()
    assert resume_training(tmp_path / "run").summary["images"] == 16


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, pictures, monkeypatch):
    """The error of a full disk is told even though it cannot be written into the folder."""
    config = small(tmp_path, pictures, checkpoint_seconds=0.0)
    save, calls = RunFolder.save_checkpoint, iter(range(1000))

    def full(self, name, state):
        if next(calls) >= 2:
            raise ValueError("cannot write the checkpoint: No space left on device")
        return save(self, name, state)

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    monkeypatch.setattr(RunFolder, "finish", lambda self, summary: (_ for _ in ()).throw(ValueError("disk full")))
    with pytest.raises(ValueError, match="No space left on device"):
        run_training(config)
    monkeypatch.undo()
    assert seen(tmp_path / "run" / "checkpoints" / "last.pt") in (4, 8)
    assert resume_training(tmp_path / "run").summary["images"] == 16
