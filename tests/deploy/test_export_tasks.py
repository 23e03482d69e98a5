"""Segmenters, networks for clips and detectors in files for deployment: they say what the trained network says."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from exported_files import file, plain_weights, run_file, told
from torch import nn

from batchless.data.clip_sampling import FrameSampling
from batchless.data.statistics import normalized
from batchless.deploy import ExportConfig, export_checkpoint, load_folded
from batchless.deploy.detector_graph import detection_difference
from batchless.deploy.exportable import UNSCALED
from batchless.deploy.real_inputs import real_clips, real_pictures, real_scenes
from batchless.models.detectors import DetectorSettings
from batchless.models.video import clip_input
from batchless.tasks import load_trained
from batchless.tasks.segment import SegmentSettings
from small_detectors import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*(values per group|fewer groups give)")
CLASSES = ("ground", "cat", "dog")
SMALL = replace(TINY, longest_side=96, detections_per_image=30)
ROOT = {"data": {"image_size": 16, "crop_padding": 0}}


def export(checkpoint, tmp_path, format, **options):
    out = tmp_path / "out" / file(format)
    return export_checkpoint(ExportConfig(checkpoint=str(checkpoint), format=format, out=str(out), **options))


SEGMENTERS = [
    ("cifar_resnet8_lraspp", "bcn-micro+ws", "onnx"),
    ("cifar_resnet8_lraspp", "gn+ws", "exported_program"),
    ("cifar_resnet8_lraspp", "none+sws", "torch"),
    ("torchvision:lraspp_mobilenet_v3_large", "bcn-micro+ws", "onnx"),
    ("smp:Unet-resnet18", "bcn-micro+ws", "onnx"),
    ("smp:Unet-resnet18", "gn", "torch"),
]


@pytest.mark.parametrize(("model", "normalizer", "format"), SEGMENTERS)
@torch.no_grad()
def test_a_segmenters_file_takes_images_of_any_number_and_size(checkpoint, tmp_path, model, normalizer, format):
    settings = SegmentSettings(crop=(64, 64), class_names=())
    path = checkpoint(model, normalizer, task="segment", classes=CLASSES, segment=settings)
    trained = load_trained(path)
    exported = export(path, tmp_path, format)
    assert 0 <= exported.difference < 1e-4
    assert exported.images_from == "the run's test images"
    for shape in ((1, 64, 96), (2, 96, 64), (3, 160, 128)):
        images = torch.randn(shape[0], 3, *shape[1:])
        expected = trained.model(images)
        assert expected.std(1).min() > 0
        scale = float(expected.abs().max())
        torch.testing.assert_close(run_file(exported.path, images), expected, rtol=0, atol=1e-4 * scale)
    if format == "onnx":
        convolutions = [module for module in trained.model.modules() if isinstance(module, nn.Conv2d)]
        assert plain_weights(exported.path) == [True] * len(convolutions)
        facts = told(exported.path)
        multiples = ", H and W multiples of 32 (zeros are added below and to the right)"
        assert facts["input"] == "images [N, 3, H, W]" + (multiples if model.startswith("smp:") else "")
        assert (facts["output"], facts["image_size"], json.loads(facts["classes"])) == (
            "scores [N, 3, H, W]",
            "null",
            list(CLASSES),
        )


VIDEO = [
    ("tsm:cifar_resnet8", "bcn-micro+ws", "onnx", True),
    ("tsm:cifar_resnet8", "gn+ws", "exported_program", False),
    ("tsm-online:cifar_resnet8", "gn+ws", "onnx", False),
    ("tsn:cifar_resnet8", "none+sws", "torch", True),
    ("torchvision:mc3_18", "bcn-micro+ws", "onnx", False),
    ("torchvision:r3d_18", "gn+ws", "exported_program", True),
]


@pytest.mark.parametrize(("model", "normalizer", "format", "include"), VIDEO)
@torch.no_grad()
def test_a_file_for_clips_takes_any_number_of_them(checkpoint, tmp_path, model, normalizer, format, include):
    video = FrameSampling(frames=4, way="dense")
    path = checkpoint(model, normalizer, task="video", classes=CLASSES, video=video, **ROOT)
    trained = load_trained(path)
    exported = export(path, tmp_path, format, include_normalization=include)
    assert 0 <= exported.difference < 1e-4
    clips = torch.cat(real_clips(trained)[0])
    assert clips.shape == (4, 4, 3, 16, 16)
    for count in (1, 2, 4):
        expected = trained.model(clip_input(trained.model, normalized(clips[:count], trained.statistics)))
        assert expected.std(1).min() > 0
        given = normalized(clips[:count], UNSCALED if include else trained.statistics)
        found = run_file(exported.path, clip_input(trained.model, given))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    if format == "onnx":
        assert all(plain_weights(exported.path))
        facts = told(exported.path)
        shape = "4, 3" if model.startswith("ts") else "3, 4"
        assert facts["input"] == f"clips [N, {shape}, 16, 16]"
        assert json.loads(facts["sampling"]) == {"frames": 4, "way": "dense", "stride": 2, "views": 1}


def bolder(detector):
    """One-stage detectors begin with scores of nearly nothing."""
    for name, parameter in detector.named_parameters():
        if name.endswith("cls_logits.bias"):
            parameter.data.uniform_(-2, 0, generator=torch.Generator().manual_seed(0))


DETECTORS = [
    ("fasterrcnn_resnet18_fpn", "bcn-micro+ws"),
    ("maskrcnn_resnet18_fpn", "gn+ws"),
    ("retinanet_resnet18_fpn", "bcn-micro+ws"),
    ("fcos_resnet18_fpn", "bn"),
]


@pytest.mark.parametrize(("model", "normalizer"), DETECTORS)
@torch.no_grad()
def test_a_detectors_files_find_what_it_finds(checkpoint, tmp_path, model, normalizer):
    path = checkpoint(model, normalizer, task="detect", classes=CLASSES, detector=SMALL, change=bolder)
    trained = load_trained(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = [export(path, tmp_path, format) for format in ("onnx", "torch")]
    graph, folded = (exported.path for exported in files)
    assert all(0 <= exported.difference < 1e-3 for exported in files)
    assert str(files[0]).endswith("1 at a time")
    assert all(plain_weights(graph))
    content = graph.read_bytes()
    assert b"site-packages" not in content
    network = load_folded(folded).model
    for image in [*real_pictures(trained)[0], torch.randint(0, 256, (3, 64, 90), dtype=torch.uint8)]:
        scaled = normalized(image, UNSCALED)
        expected, of_graph = trained.model([scaled])[0], run_file(graph, scaled)
        assert of_graph.keys() == expected.keys()
        assert len(expected["scores"])
        for found in (of_graph, network([scaled])[0]):
            difference = detection_difference(expected, found, SMALL)
            assert difference is None or difference < 1e-3
    facts = told(graph)
    assert (facts["resize_shorter_side"], facts["longest_side"]) == ("64", "96")
    assert json.loads(facts["normalization_included"])


def test_what_a_format_cannot_hold_is_told(checkpoint, tmp_path):
    path = checkpoint("fcos_resnet18_fpn", "gn", task="detect", classes=CLASSES, detector=SMALL)
    with pytest.raises(ValueError, match=r"task=detect: --format exported_program cannot hold .*, torch and onnx can$"):
        export(path, tmp_path, "exported_program")
    with pytest.raises(ValueError, match=r"torch cannot write fcos_resnet18_fpn as ONNX .* or --format torch$"):
        export(path, tmp_path, "onnx", opset=25)
    assert not (tmp_path / "out").exists()


def test_a_detector_that_finds_nothing_cannot_be_checked(checkpoint, tmp_path):
    settings = DetectorSettings(**{**vars(SMALL), "score_threshold": 0.999})
    path = checkpoint("fcos_resnet18_fpn", "gn", task="detect", classes=CLASSES, detector=settings)
    with pytest.raises(ValueError, match=r"best\.pt finds no object in 4 images, so that a file cannot be checked"):
        export(path, tmp_path, "torch")


def objects(*rows):
    """Objects with masks from (label, score, left)."""
    masks = torch.zeros(len(rows), 1, 10, 10)
    for number, (_, _, left) in enumerate(rows):
        masks[number, 0, :, int(left) :] = 1
    return {
        "boxes": torch.tensor([[left, 0.0, 10.0, 10.0] for _, _, left in rows]).reshape(-1, 4),
        "labels": torch.tensor([label for label, _, _ in rows]),
        "scores": torch.tensor([score for _, score, _ in rows]),
        "masks": masks,
    }


def test_how_far_objects_are_from_each_other():
    settings = DetectorSettings(score_threshold=0.5, detections_per_image=3)
    some = objects((1, 0.9, 2.0), (2, 0.8, 4.0))

    def difference(*rows, of=some):
        return detection_difference(of, objects(*rows), settings)

    assert difference((2, 0.8, 4.0), (1, 0.9, 2.0)) == 0
    assert difference((1, 0.9, 2.0), (2, 0.6, 4.0)) == pytest.approx(0.2)
    assert difference((1, 0.9, 2.0), (2, 0.8, 4.5)) == pytest.approx(0.05)
    assert difference((1, 0.9, 2.0), (1, 0.8, 4.0)) == float("inf")
    assert difference((1, 0.9, 2.0)) == float("inf")
    assert difference() == float("inf")
    # Near the threshold, or the end of a full list, rounding decides.
    assert difference((1, 0.9, 2.0), (2, 0.8, 4.0), (3, 0.50001, 0.0)) == 0
    full = objects((1, 0.9, 2.0), (2, 0.8, 4.0), (3, 0.7, 0.0))
    assert difference((1, 0.9, 2.0), (2, 0.8, 4.0), (3, 0.7, 6.0), of=full) == 0
    assert detection_difference(objects(), objects(), settings) is None
    shifted = objects((1, 0.9, 2.0), (2, 0.8, 4.0))
    shifted["masks"] = 1 - shifted["masks"]
    assert detection_difference(some, shifted, settings) == 1


def test_scenes_are_of_two_sizes(checkpoint):
    path = checkpoint("cifar_resnet8_lraspp", "gn", task="segment", classes=CLASSES)
    (whole, cut), _ = real_scenes(load_trained(path), multiple=32)
    assert (len(whole), len(cut)) == (1, 3)
    assert whole.shape[-2:] != cut.shape[-2:]
    assert all(side % 32 == 0 for side in (*whole.shape[-2:], *cut.shape[-2:]))
