"""Label maps from a folder to a run, and what the verbs make of it."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from stopped_runs import assert_the_same_bits_after_a_stop

from batchless.advise.doctor import DoctorConfig, run_doctor
from batchless.arguments import parse_arguments
from batchless.cli import main
from batchless.demo import DemoConfig
from batchless.deploy import (
    EvaluateConfig,
    PredictConfig,
    evaluate_checkpoint,
    evaluation_tables,
    predict_checkpoint,
    prediction_table,
)
from batchless.deploy.evaluation import EvaluationData
from batchless.report.main_figure import main_figure
from batchless.runs import load_checkpoint, read_run
from batchless.tasks import DataSettings, TrainConfig, load_trained, run_training
from batchless.tasks.segment import SegmentSettings
from batchless.train.settings import OptimizerSettings
from small_maps import WIDTH, save_image, save_map, scene, write_folders

pytestmark = pytest.mark.filterwarnings("ignore:.*values per group")
DEEPLAB = "torchvision:deeplabv3_mobilenet_v3_large"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("maps"))


def config(root, out, **changes):
    values = {
        "task": "segment",
        "model": "cifar_resnet8_lraspp",
        "images": 16,
        "images_per_step": 4,
        "evaluations": 2,
        "out": str(out),
        "tensorboard": False,
        "data": DataSettings(root=str(root), flip=True),
        "segment": SegmentSettings(scales=(0.5, 2.0), crop=(16, 16), class_names=("ground", "cat", "dog")),
        "optimizer": OptimizerSettings(learning_rate=0.3, clip_norm=10.0),
    }
    return TrainConfig(**values | changes)


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    return run_training(config(root, tmp_path_factory.mktemp("runs") / "run"))


def test_a_run_tells_miou_and_shows_maps(run):
    assert {"test_miou", "test_pixel_accuracy", "test_loss"} <= set(run.summary)
    records = json.loads((run.folder / "pictures" / "predictions.json").read_text())
    assert {record["measure"] for record in records} == {"mIoU"}
    read = read_run(run.folder)
    assert (main_figure(read).name, main_figure(read).word) == ("miou", "mIoU")
    assert TrainConfig.from_plain(read.config, source="config.yaml") == replace(
        config(read.config["data"]["root"], run.folder), normalizer=read.config["normalizer"]
    )


@pytest.mark.parametrize("normalizer", ["bcn-micro+ws", "bn"])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(root, tmp_path, normalizer):
    assert_the_same_bits_after_a_stop(config(root, tmp_path / "whole", normalizer=normalizer), tmp_path)


def test_a_checkpoint_is_evaluated_as_in_training(run, tmp_path):
    checkpoint = str(run.folder / "checkpoints" / "last.pt")
    found = evaluate_checkpoint(EvaluateConfig(checkpoint=checkpoint, out=str(tmp_path / "figures.json")))
    assert {name: run.summary[f"test_{name}"] for name in ("miou", "pixel_accuracy", "loss")}.items() <= found.items()
    assert [row["class"] for row in found["per_class"]] == ["ground", "cat", "dog"]
    assert sum(row["pixels"] for row in found["per_class"]) == sum(
        int((scene(seed)[1] != 255).sum()) for seed in range(100, 104)
    )
    known = [row["iou"] for row in found["per_class"] if row["iou"] is not None]
    assert found["miou"] == pytest.approx(sum(known) / len(known))
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    file = io.StringIO()
    Console(width=120, file=file).print(evaluation_tables(found))
    assert f"mIoU {100 * found['miou']:.1f} %" in file.getvalue()


def test_another_data_set_with_the_classes_in_another_order(run, tmp_path):
    checkpoint = str(run.folder / "checkpoints" / "last.pt")
    write_folders(tmp_path, train=1)
    for path in tmp_path.glob("*/labels/*.png"):
        values = np.asarray(Image.open(path))
        save_map(np.array([2, 1, 0, *range(3, 256)], np.uint8)[values], path)
    (tmp_path / "classes.txt").write_text("dog\ncat\nground\n")
    trained_without = run.folder / "checkpoints" / "unnamed.pt"
    saved = load_checkpoint(checkpoint)
    saved["config"]["segment"]["class_names"] = []
    torch.save(saved, trained_without)
    data = EvaluationData(root=str(tmp_path))
    found = evaluate_checkpoint(EvaluateConfig(checkpoint=str(trained_without), data=data))
    assert found["miou"] == run.summary["test_miou"]
    (tmp_path / "classes.txt").write_text("owl\ncat\nground\n")
    with pytest.raises(ValueError, match=r"classes that the run has not \(owl\); the run's are ground, cat, dog"):
        evaluate_checkpoint(EvaluateConfig(checkpoint=str(trained_without), data=data))


def test_images_of_the_users_keep_their_size(run, tmp_path):
    checkpoint = str(run.folder / "checkpoints" / "best.pt")
    (tmp_path / "in").mkdir()
    image, _ = scene(7, height=50, width=WIDTH + 13)
    save_image(image, tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_text("no image")
    asked = PredictConfig(
        checkpoint=checkpoint,
        images=(str(tmp_path / "in"),),
        pictures=str(tmp_path / "maps"),
        out=str(tmp_path / "out"),
    )
    first, second = predict_checkpoint(asked)
    assert "cannot be read" in second.error
    with Image.open(tmp_path / "maps" / "a.png") as label_map, Image.open(tmp_path / "maps" / "a.jpg") as shown:
        assert (label_map.size, label_map.mode, shown.size) == ((45, 50), "P", (45, 50))
        values = np.asarray(label_map)
    for label, name in enumerate(("ground", "cat", "dog")):
        assert dict(first.areas).get(name, 0) == pytest.approx((values == label).mean())
    assert json.loads((tmp_path / "out").read_text().splitlines()[0])["areas"][0]["class"] == first.areas[0][0]
    file = io.StringIO()
    Console(width=160, file=file).print(prediction_table([first, second]))
    assert "share of pixels" in file.getvalue()


def test_the_network_of_a_checkpoint_comes_back(run):
    trained = load_trained(run.folder / "checkpoints" / "best.pt")
    assert trained.model(torch.zeros(1, 3, 20, 30)).shape == (1, 3, 20, 30)


def test_export_writes_a_file(run, capsys, tmp_path):
    assert main(["export", str(run.folder / "checkpoints" / "best.pt"), "--out", str(tmp_path / "a.onnx")]) == 0
    assert "of the largest one, on the run's test images, 1 and 3 at a time" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("normalizer", "says"),
    [
        ("bn", r"^Expected more than 1 value per channel.*at images_per_forward=1 .* choose a normalizer without them"),
        ("bcn", r"^batch statistics of an input \(1, 256, 1, 1\) would be of one value per channel.*use more images"),
    ],
)
def test_deeplabs_pooled_map_of_one_image_is_told(root, tmp_path, normalizer, says):
    short = {"images": 2, "images_per_step": 2, "evaluations": 1}
    segment = SegmentSettings(crop=(32, 32))
    wanted = config(root, tmp_path / "run", model=DEEPLAB, normalizer=normalizer, segment=segment, **short)
    with pytest.raises(ValueError, match=says) as error:
        run_training(wanted)
    assert "\n" not in str(error.value)
    assert read_run(tmp_path / "run").summary["failed"] == str(error.value)


def test_instances_of_one_position_are_told_before_the_run_begins(root, tmp_path):
    segment = SegmentSettings(crop=(32, 32))
    wanted = config(root, tmp_path / "run", model=DEEPLAB, normalizer="in", segment=segment)
    with pytest.raises(
        ValueError, match=r"^classifier\.0\.convs\.4\.2: instance normalization needs an input with space"
    ):
        run_training(wanted)
    assert not (tmp_path / "run").exists()


def test_the_doctor_predicts_it():
    found = run_doctor(DoctorConfig(model=DEEPLAB, image_size=64))
    assert [finding.layer for finding in found.findings if finding.kind == "raises"] == ["classifier.0.convs.4.2"]


def test_settings_that_do_not_go_with_segmentation(root, tmp_path):
    for changes, message in (
        ({"data": DataSettings(mixup=0.2)}, r"data\.mixup is a setting of task=classify and does nothing"),
        ({"data": DataSettings(image_size=16)}, r"data\.image_size is a setting of task=classify"),
        ({"task": "classify"}, r"segment is a setting of task=segment and does nothing in task=classify"),
    ):
        with pytest.raises(ValueError, match=message):
            config(root, tmp_path, **changes)
    for settings, message in (
        ({"scales": (2.0, 1.0)}, r"segment\.scales=\[2\.0, 1\.0\]"),
        ({"crop": (0, 3)}, r"segment\.crop=\[0, 3\]"),
        ({"ignore": (256,)}, r"segment\.ignore has values of label maps, 0 to 255; got \[256\]"),
        ({"class_names": ("a", "a")}, "names a class twice"),
        ({"output_stride": 4}, r"segment\.output_stride must be 8, 16 or null"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentSettings(**settings)
    with pytest.raises(ValueError, match="unknown segmenter 'torchvision:resnet18'"):
        run_training(config(root, tmp_path / "run", model="torchvision:resnet18"))
    with pytest.raises(ValueError, match=r"data\.train_images=9: the data set has 8 train images"):
        run_training(config(root, tmp_path / "run", data=DataSettings(root=str(root), train_images=9)))
    assert not (tmp_path / "run").exists()


def test_a_damaged_map_in_mid_epoch_leaves_a_failed_run(tmp_path):
    write_folders(tmp_path / "maps", train=6, test=1)
    save_map(np.full((24, 32), 77, np.uint8), tmp_path / "maps" / "train" / "labels" / "004.png")
    with pytest.raises(ValueError, match=r"004\.png: 768 pixels have the value 77"):
        run_training(config(tmp_path / "maps", tmp_path / "run"))
    assert "have the value 77" in read_run(tmp_path / "run").summary["failed"]


def test_the_command_line_and_the_demo():
    words = ["train", "--config", "camvid_lraspp", "--segment.crop", "[60, 80]", "--segment.shorter_side", "null"]
    parsed = parse_arguments(words)
    assert isinstance(parsed, TrainConfig)
    assert (parsed.task, parsed.segment.crop, parsed.segment.shorter_side) == ("segment", (60, 80), None)
    demo = parse_arguments(["demo", "--task", "segment", "--train.images", "64"])
    assert (demo.train.model, demo.train.images, demo.images_per_forward) == ("cifar_resnet8_lraspp", 64, (1, 2, 8))
    assert {run.images_per_step for run in DemoConfig(train=TrainConfig(task="segment")).runs()} == {8}


def test_a_step_on_camvid(real_data, tmp_path):
    if not (real_data / "camvid").is_dir():
        pytest.skip(f"needs CamVid in {real_data / 'camvid'}")
    parsed = parse_arguments(["train", "--config", "camvid_lraspp", "--data.root", str(real_data / "camvid")])
    short = replace(
        parsed,
        images=8,
        evaluations=1,
        out=str(tmp_path / "run"),
        model="cifar_resnet8_lraspp",
        tensorboard=False,
        data=replace(parsed.data, test_images=3),
    )
    found = run_training(short)
    assert 0 <= found.summary["test_miou"] < 0.5
    assert found.notes == ()


@pytest.mark.slow
def test_the_embedded_sample_is_learned(tmp_path):
    parsed = parse_arguments(["train", "--config", "embedded_segments"])
    found = run_training(replace(parsed, normalizer="gn+ws", out=str(tmp_path / "run"), tensorboard=False))
    assert found.summary["test_miou"] > 0.5
