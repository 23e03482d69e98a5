"""A run that is stopped and resumed, of whatever task."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batchless.runs import load_checkpoint
from batchless.tasks import TrainConfig, resume_training, run_training
from batchless.train.interrupt import TrainingStoppedError


def assert_the_same_bits_after_a_stop(whole: TrainConfig, folder: Path) -> None:
    """The run is stopped after one step and after three, resumed, and compared with the uninterrupted one."""
    run_training(whole)
    for steps in (1, 3):
        cut = replace(whole, out=str(folder / f"cut{steps}"))
        calls = iter(range(10**6))
        with pytest.raises(TrainingStoppedError):
            run_training(cut, should_stop=lambda calls=calls, steps=steps: next(calls) >= steps - 1)
        resume_training(cut.folder())
        states = [load_checkpoint(each.folder() / "checkpoints" / "last.pt")["model"] for each in (whole, cut)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
