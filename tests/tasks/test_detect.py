import pytest
import torch

from batchless.arguments import parse_arguments
from batchless.runs import load_checkpoint
from batchless.tasks import DataSettings, TrainConfig, resume_training, run_training
from batchless.train import TrainingStoppedError
from batchless.train.settings import OptimizerSettings
from small_detectors import TINY


def config(folder) -> TrainConfig:
    return TrainConfig(
        task="detect",
        model="maskrcnn_resnet18_fpn",
        normalizer="gn+ws",
        images=8,
        images_per_step=4,
        evaluations=1,
        out=str(folder),
        tensorboard=False,
        checkpoint_seconds=0,
        data=DataSettings(train_images=6, test_images=2),
        detector=TINY,
        optimizer=OptimizerSettings(learning_rate=0.001),
    )


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = run_training(config(tmp_path / "whole"))
    assert {"test_ap", "test_mask_ap"} <= whole.summary.keys()
    with pytest.raises(TrainingStoppedError):
        run_training(config(tmp_path / "stopped"), should_stop=lambda: True)
    resume_training(tmp_path / "stopped")
    one, other = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("whole", "stopped")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_settings_of_the_other_task_are_refused():
    with pytest.raises(ValueError, match=r"data\.mixup is a setting of task=classify"):
        TrainConfig(task="detect", model="fcos_resnet18_fpn", data=DataSettings(mixup=0.2))
    with pytest.raises(ValueError, match="detector is a setting of task=detect"):
        TrainConfig(detector=TINY)


def test_the_demo_of_detection_keeps_what_is_said():
    demo = parse_arguments(["demo", "--task", "detect", "--train.images", "16"])
    assert (demo.train.task, demo.train.images, demo.images_per_forward) == ("detect", 16, (1, 2))
    assert demo.train.detector.stages == 2
