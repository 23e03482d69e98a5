"""Clips from a folder to a run, and what the verbs make of it."""

import json
from dataclasses import replace

import pytest
import torch
from stopped_runs import assert_the_same_bits_after_a_stop

from batchless.arguments import parse_arguments
from batchless.cli import main
from batchless.data.clip_sampling import FrameSampling
from batchless.demo import DemoConfig
from batchless.deploy import EvaluateConfig, PredictConfig, predict_checkpoint
from batchless.deploy.evaluation import evaluate_checkpoint
from batchless.runs import read_run
from batchless.tasks import DataSettings, TrainConfig, load_trained, run_training
from small_clips import CLASSES, moving_bar, write_clips, write_frames, write_video


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), train=12, test=6)


def config(root, out, **changes):
    values = {
        "task": "video",
        "model": "tsm:cifar_resnet8",
        "images": 16,
        "images_per_step": 4,
        "evaluations": 2,
        "out": str(out),
        "tensorboard": False,
        "data": DataSettings(root=str(root), image_size=16, crop_padding=1),
        "video": FrameSampling(frames=4),
    }
    return TrainConfig(**values | changes)


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    return run_training(config(root, tmp_path_factory.mktemp("runs") / "run"))


def test_a_run_tells_accuracy_top5_and_shows_strips(run):
    assert {"test_accuracy", "test_top5", "test_class_accuracy", "test_loss", "test_short_clips"} <= set(run.summary)
    records = json.loads((run.folder / "pictures" / "predictions.json").read_text())
    assert records[0]["source"].endswith(("0", "1", "2", "3", "4", "5"))
    again = TrainConfig.from_plain(read_run(run.folder).config, source="config.yaml")
    assert (again.task, again.video.frames, again.model) == ("video", 4, "tsm:cifar_resnet8")


@pytest.mark.parametrize("normalizer", ["bcn-micro+ws", "bn"])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(root, tmp_path, normalizer):
    assert_the_same_bits_after_a_stop(config(root, tmp_path / "whole", normalizer=normalizer), tmp_path)


def test_a_checkpoint_is_evaluated_as_in_training(run, root, tmp_path):
    checkpoint = str(run.folder / "checkpoints" / "last.pt")
    found = evaluate_checkpoint(EvaluateConfig(checkpoint=checkpoint))
    assert {name: run.summary[f"test_{name}"] for name in ("accuracy", "top5", "loss")}.items() <= found.items()
    assert [row["class"] for row in found["per_class"]] == list(CLASSES)
    assert sum(row["images"] for row in found["per_class"]) == 6
    write_video(tmp_path / "train" / "left" / "a.mp4", moving_bar(0))
    write_video(tmp_path / "test" / "left" / "a.mp4", moving_bar(0))
    other = EvaluateConfig(checkpoint=checkpoint, data=replace(EvaluateConfig(checkpoint="").data, root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"other classes than the run: 1 of the run's missing \(right\)"):
        evaluate_checkpoint(other)


def test_clips_of_the_users_are_predicted_and_drawn(run, tmp_path):
    write_video(tmp_path / "videos" / "a.mp4", moving_bar(0))
    (tmp_path / "videos" / "b.mp4").write_text("no video")
    write_frames(tmp_path / "frames", moving_bar(1))
    checkpoint = str(run.folder / "checkpoints" / "best.pt")
    paths = (str(tmp_path / "videos"), str(tmp_path / "frames"))
    found = predict_checkpoint(PredictConfig(checkpoint=checkpoint, images=paths, pictures=str(tmp_path / "strips")))
    assert [prediction.error is None for prediction in found] == [True, False, True]
    assert sum(share for _, share in found[0].classes) == pytest.approx(1)
    assert len(list((tmp_path / "strips").iterdir())) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a video file nor a picture"):
        predict_checkpoint(PredictConfig(checkpoint=checkpoint, images=(str(tmp_path / "empty"),)))


def test_the_network_of_a_checkpoint_takes_clips(run):
    trained = load_trained(run.folder / "checkpoints" / "best.pt")
    assert trained.model(torch.zeros(1, 4, 3, 16, 16)).shape == (1, 2)


def test_export_writes_a_file(run, capsys, tmp_path):
    assert main(["export", str(run.folder / "checkpoints" / "best.pt"), "--out", str(tmp_path / "a.onnx")]) == 0
    assert "of the largest one, on the run's test clips, 1 and 3 at a time" in " ".join(capsys.readouterr().out.split())


def test_3d_networks_train_too(root, tmp_path):
    short = {"images": 2, "images_per_step": 2, "evaluations": 1}
    data = DataSettings(root=str(root), image_size=16, test_images=2)
    found = run_training(config(root, tmp_path / "run", model="torchvision:mc3_18", data=data, **short))
    assert any(entry.now == "WSConv3d" for entry in found.conversion.replaced)


def test_settings_that_do_not_go_with_clips(root, tmp_path):
    with pytest.raises(ValueError, match=r"data\.mixup is a setting of task=classify and does nothing in task=video"):
        config(root, tmp_path, data=DataSettings(mixup=0.2))
    with pytest.raises(ValueError, match="unknown video network 'torchvision:resnet18'"):
        run_training(config(root, tmp_path / "run", model="torchvision:resnet18"))
    assert not (tmp_path / "run").exists()


def test_a_size_that_the_network_does_not_take_names_the_setting(root, tmp_path):
    data = DataSettings(root=str(root), image_size=16)
    with pytest.raises(ValueError, match=r"does not run on 16x16 images .*: choose another data\.image_size or model"):
        run_training(config(root, tmp_path / "run", model="torchvision:s3d", data=data))


def test_the_command_line_sets_frames():
    words = ["train", "--config", "embedded_clips", "--video.frames", "4", "--video.way", "dense"]
    parsed = parse_arguments(words)
    assert isinstance(parsed, TrainConfig)
    assert (parsed.task, parsed.video) == ("video", FrameSampling(frames=4, way="dense"))


def test_the_demo_of_clips():
    runs = DemoConfig(train=TrainConfig(task="video")).runs()
    assert {(run.task, run.model, run.data.image_size, run.data.crop_padding, run.images) for run in runs} == {
        ("video", "tsm:cifar_resnet8", 16, 0, 3200)
    }
    changed = DemoConfig(train=TrainConfig(task="video", images=64, data=DataSettings(image_size=24))).runs()[0]
    assert (changed.images, changed.data.image_size) == (64, 24)
