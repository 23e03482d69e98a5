"""What holds for the runs of every task: memory does not grow over steps, and two processes learn what one learns."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from batchless.data.clip_sampling import FrameSampling
from batchless.runs import load_checkpoint
from batchless.tasks import DataSettings, TrainConfig, run_training
from batchless.tasks.segment import SegmentSettings
from batchless.train.settings import OptimizerSettings
from small_detectors import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*values per group")
SETTINGS = {
    "classify": {"model": "cifar_resnet8", "data": DataSettings(image_size=16, train_images=40, test_images=10)},
    "detect": {
        "model": "maskrcnn_resnet18_fpn",
        "data": DataSettings(train_images=6, test_images=2),
        "detector": TINY,
    },
    "segment": {
        "model": "cifar_resnet8_lraspp",
        "data": DataSettings(train_images=6, test_images=2),
        "segment": SegmentSettings(crop=(32, 32)),
    },
    "video": {
        "model": "tsm:cifar_resnet8",
        "data": DataSettings(image_size=16, crop_padding=0, train_images=6, test_images=6),
        "video": FrameSampling(frames=4),
    },
}
TASKS = list(SETTINGS)


def config(task, out, **changes):
    values = {"normalizer": "bcn-micro+ws", "images": 8, "images_per_step": 4, "evaluations": 1, "threads": 1}
    values |= {"optimizer": OptimizerSettings(learning_rate=0.001), "tensorboard": False, "out": str(out)}
    return TrainConfig(task=task, **values | SETTINGS[task] | changes)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("task", TASKS)
def test_memory_does_not_grow_over_a_hundred_steps(task, tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("the resident memory is read from Linux's /proc")
    seen = []

    def watch():
        seen.append(resident_bytes())
        return False

    run_training(config(task, tmp_path / "run", images=100, images_per_step=1), should_stop=watch)
    assert len(seen) >= 100
    growth = median(seen[-25:]) - median(seen[25:50])
    assert growth < 8 * 2**20, "50 steps that each kept the gradients of the smallest network would keep 15 MiB"


def finish(wanted: TrainConfig, file: Path, processes: int) -> dict[str, torch.Tensor]:
    file.write_text(json.dumps(wanted.plain()))  # JSON is YAML
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *torchrun, "-m", "batchless.cli", "train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_checkpoint(wanted.folder() / "checkpoints" / "last.pt")["model"]


@pytest.mark.parametrize("task", ["segment", "video"])
def test_two_processes_learn_what_one_learns(task, tmp_path):
    together = finish(config(task, tmp_path / "two"), tmp_path / "two.yaml", 2)
    one = config(task, tmp_path / "one")
    run_training(one)
    alone = load_checkpoint(one.folder() / "checkpoints" / "last.pt")["model"]
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_with_a_detector_end_with_the_same_bits_each_time(tmp_path):
    """Each process draws its own regions to learn from, so that two learn other ones than one process does."""
    first, again = (finish(config("detect", tmp_path / out), tmp_path / f"{out}.yaml", 2) for out in ("a", "b"))
    start = config("detect", tmp_path / "start", images=4)
    run_training(replace(start, optimizer=OptimizerSettings(learning_rate=1e-9)))
    untrained = load_checkpoint(tmp_path / "start" / "checkpoints" / "last.pt")["model"]
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.allclose(value, untrained[name]) for name, value in first.items())
