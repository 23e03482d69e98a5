import sys

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchless as bl
from batchless.models import build_any, example_inputs
from batchless.models.example import FRAMES, built_for, detection_targets, is_detector
from batchless.models.names import torchvision_names

EVERY_FORM = [
    "cifar_resnet8",
    "timm:test_resnet",
    "timm:resnet10t.c3_in1k",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:googlenet",
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision:r2plus1d_18",
    "fcos_resnet18_fpn",
    "cifar_resnet8_lraspp",
    "tsm:cifar_resnet8",
    "tsm-online:timm:test_resnet",
    "smp:PSPNet-resnet18",
    "smp:Unet-timm-skresnet18",
    "smp:Unet-tu-test_resnet",
]


@pytest.mark.filterwarnings("ignore:`timm-` encoders:DeprecationWarning")
@pytest.mark.parametrize("name", EVERY_FORM)
def test_a_model_of_every_form_runs_on_its_example_by_name_and_by_model(name):
    model = build_any(name)
    assert model.training
    assert any(isinstance(module, _BatchNorm) for module in model.modules())
    size = 32 if "r2plus1d" in name else 64
    by_name = example_inputs(name, 2, size, training=True)
    by_model = example_inputs(model, 2, size, training=True)
    torch.testing.assert_close(by_model, by_name, rtol=0, atol=0)
    with torch.no_grad():
        model(*by_model)
        model.eval()(*example_inputs(model, 1, size))


def test_no_builder_reads_or_downloads_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    names = [
        "torchvision:deeplabv3_mobilenet_v3_large",
        "torchvision:ssdlite320_mobilenet_v3_large",
        "timm:test_resnet",
    ]
    for name in [*names, "smp:FPN-resnet18"]:
        build_any(name)


def test_quantized_networks_and_optical_flow_are_not_among_torchvisions():
    tasks = torchvision_names()
    assert {"classification", "segmentation", "detection", "video"} == set(tasks.values())
    assert tasks["fcn_resnet50"] == "segmentation"
    assert tasks["retinanet_resnet50_fpn"] == "detection"
    assert tasks["s3d"] == "video"
    assert not any("quantized" in name or "raft" in name for name in tasks)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("torchvision:deeplabv3_resnet5", "torchvision:deeplabv3_resnet50"),
        ("torchvision:maskrcnn_resnet_50_fpn", "torchvision:maskrcnn_resnet50_fpn"),
        ("timm:mobilenetv4_conv_smal", "timm:mobilenetv4_conv_small"),
        ("cifar-resnet20", "cifar_resnet20"),
        ("smp:DeepLabv3-resnet18", "DeepLabV3"),
        ("smp:PSPNet-resnet81", "resnet18"),
        ("smp:Unet-tu-test_resnt", "tu-test_resnet"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name, nearest):
    with pytest.raises(ValueError, match=r"^unknown (model|architecture|encoder)") as caught:
        build_any(name)
    message = str(caught.value)
    assert name in message
    assert nearest in message.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert "smp:<Architecture>-<encoder>" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name", ["", ":", "smp", "torchvision:", "torchvision:raft_small", "torchvision:quantized_resnet18"]
)
def test_a_name_of_nothing_tells_what_is_possible(name):
    with pytest.raises(
        ValueError,
        match=r"expected timm:<name> .*, torchvision:<name> .*, smp:<Architecture>-<encoder> .* or tsm:<2D network>",
    ):
        build_any(name)


def test_a_pair_that_segmentation_models_cannot_build_tells_why():
    with pytest.raises(ValueError, match=r"cannot build 'smp:DPT-resnet18' \(Only Timm encoders .*choose another"):
        build_any("smp:DPT-resnet18")


@pytest.mark.filterwarnings("ignore:`timm-` encoders:DeprecationWarning")
def test_former_names_of_encoders_are_the_librarys_business():
    assert type(build_any("smp:Unet-timm-regnetx_002")).__name__ == "Unet"
    with pytest.raises(
        ValueError, match=r"cannot build 'smp:Unet-timm-nothing' \(.*Wrong encoder name.*choose another"
    ):
        build_any("smp:Unet-timm-nothing")


def test_without_segmentation_models_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'batchless\[segmentation\]'"):
        build_any("smp:Unet-resnet18")


def test_the_examples_are_images_lists_of_images_or_clips():
    assert [tuple(x.shape) for x in example_inputs(nn.Conv2d(3, 8, 3), 2, 16)] == [(2, 3, 16, 16)]
    assert [tuple(x.shape) for x in example_inputs(nn.Conv3d(3, 8, 3), 2, 16)] == [(2, 3, FRAMES, 16, 16)]
    (images,) = example_inputs("torchvision:fcos_resnet50_fpn", 3, 16)
    assert [tuple(image.shape) for image in images] == [(3, 16, 16)] * 3
    assert all(image.min() >= 0 and image.max() < 1 for image in images)


def test_a_detector_trains_on_the_targets():
    model = build_any("torchvision:ssdlite320_mobilenet_v3_large")
    assert is_detector(model)
    assert not is_detector(nn.Conv2d(3, 8, 3))
    losses = model(*example_inputs(model, 2, 64, training=True))
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_the_targets_are_one_object_in_the_middle_of_each_image():
    first, second = detection_targets([torch.zeros(3, 8, 16), torch.zeros(3, 4, 4)])
    assert first["boxes"].tolist() == [[4, 2, 12, 6]]
    assert first["masks"].shape == (1, 8, 16)
    assert first["masks"].sum() == 4 * 8
    assert second["boxes"].tolist() == [[1, 1, 3, 3]]
    assert second["keypoints"].shape == (1, 17, 3)


def test_the_size_that_a_model_is_built_for():
    assert built_for(build_any("timm:levit_128s")) == " (it is built for 224)"
    assert built_for(build_any("torchvision:resnet18")) == ""


@pytest.mark.filterwarnings("ignore:.*values per group")
@pytest.mark.parametrize("name", ["torchvision:ssdlite320_mobilenet_v3_large", "torchvision:r3d_18"])
def test_examples_find_the_pairs_of_detectors_and_video_networks(name):
    model = build_any(name)
    _, report = bl.convert(model, "bcn-micro+ws", example=example_inputs(model, 1, 32), strict=True)
    assert report.found_by == "example"
    assert {entry.detail for entry in report.skipped} <= {"fan-in of 1: standardizing would set its weight to 0"}
