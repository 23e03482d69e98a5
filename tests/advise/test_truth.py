"""The doctor's verdicts against what really happens: each model trains on 1, 2 or 3 images, and its layers are looked at."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchless as bl
from batchless.advise import Diagnosis, diagnose
from batchless.models import build_any, example_inputs
from batchless.surgery.recognize import is_normalization

pytestmark = pytest.mark.filterwarnings("ignore")  # few values per group, in maps as small as here

RAISING = {
    "torchvision:deeplabv3_mobilenet_v3_large": 64,
    "torchvision:inception_v3": 299,  # its auxiliary head, in training only
    "torchvision:ssdlite320_mobilenet_v3_large": 64,
    "torchvision:resnet18": 32,
    "torchvision:shufflenet_v2_x0_5": 32,
    "timm:mobilenetv4_conv_small_035": 64,
    "timm:skresnet18": 64,
    "timm:resnest14d": 64,
    "timm:levit_128s": 224,
    "timm:resnet10t": 32,
    "smp:DeepLabV3-resnet18": 64,
    "smp:DeepLabV3Plus-mobilenet_v2": 64,
    "smp:UPerNet-resnet18": 64,
}
"""Names and sizes of images, in pixels, at which one image is one too few."""

FINE = {
    "cifar_resnet8": 32,
    "torchvision:lraspp_mobilenet_v3_large": 64,
    "torchvision:googlenet": 64,
    "torchvision:r3d_18": 32,
    "torchvision:swin_t": 64,
    "timm:test_resnet": 64,
    "timm:test_byobnet": 64,
    "timm:efficientnet_lite0": 64,
    "timm:resnetv2_50d_frn": 64,
    "smp:PSPNet-resnet18": 64,
    "smp:FPN-resnet18": 64,
    "smp:Unet-mobilenet_v2": 64,
}

EVERY = [*RAISING.items(), *FINE.items()]
CONVERTED = ["torchvision:deeplabv3_mobilenet_v3_large", "torchvision:resnet18", "timm:mobilenetv4_conv_small_035"]
CONVERTED += ["timm:test_resnet", "smp:PSPNet-resnet18", "smp:DeepLabV3-resnet18"]


def train_once(model: nn.Module, images: int, size: int) -> tuple[str | None, dict[str, int]]:
    """Which normalization raises in a training forward, and how many values the channels of each that ran have."""
    entered: list[str] = []
    values: dict[str, int] = {}

    def watch(name, module):
        def before(module, inputs):
            entered.append(name)
            count = inputs[0].numel() // inputs[0].shape[1]
            values[name] = min(count, values.get(name, count))

        module.register_forward_pre_hook(before)

    for name, module in model.named_modules():
        if is_normalization(module):
            watch(name, module)
    with torch.no_grad():
        try:
            model.train()(*example_inputs(model, images, size, training=True))
        except (ValueError, ZeroDivisionError):
            return entered[-1], values
    return None, values


def diagnosed(model: nn.Module, images: int, size: int) -> Diagnosis:
    return diagnose(model, example_inputs(model, 2, size), images_per_forward=images, try_conversion=False)


def raising(diagnosis: Diagnosis) -> set[str]:
    return {finding.layer for finding in diagnosis.findings if finding.kind == "raises"}


@pytest.mark.parametrize(("name", "size"), EVERY, ids=lambda value: str(value))
def test_a_layer_is_said_to_raise_at_one_image_if_and_only_if_training_raises_there(name, size):
    model = build_any(name)
    said = raising(diagnosed(model, 1, size))
    layer, _ = train_once(copy.deepcopy(model), 1, size)
    assert (layer is not None) == (RAISING.get(name) == size)
    assert bool(said) == (layer is not None)
    assert layer is None or layer in said
    # Not only the first of them: the model trains once all are out of the way, and not while one is there.
    for left in list(said)[:3]:
        partly = copy.deepcopy(model)
        for other in said - {left}:
            partly.get_submodule(other).forward = nn.Identity().forward
        assert train_once(partly, 1, size)[0] == left
    for other in said:
        model.get_submodule(other).forward = nn.Identity().forward
    assert train_once(model, 1, size)[0] is None


@pytest.mark.parametrize(("name", "size"), EVERY, ids=lambda value: str(value))
def test_nothing_is_said_to_raise_at_three_images_and_the_few_values_are_those_that_come(name, size):
    model = build_any(name)
    said = diagnosed(model, 3, size)
    layer, values = train_once(model, 3, size)
    assert layer is None
    assert not raising(said)
    by_batch = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    told = {f.layer: f.explanation for f in said.findings if f.kind == "few values" and f.layer in by_batch}
    few = {name: count for name, count in values.items() if count < 8 and name in by_batch}
    assert told.keys() == few.keys()
    assert all(told[name].startswith(f"statistics of {few[name]} values per channel at 3 images:") for name in few)


@pytest.mark.parametrize("images", [2, 3])
def test_hardly_a_gradient_gets_through_statistics_of_two_values(images):
    """The output is the sign of a difference: d / sqrt(d^2 + eps), whose slope is eps / (d^2 + eps)^1.5."""
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, images * 4, dtype=torch.float64).reshape(images, 4).requires_grad_()
    y = nn.BatchNorm1d(4, dtype=torch.float64)(x)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    if images == 2:
        assert torch.allclose(y.detach().abs(), torch.ones_like(y), atol=1e-4)
        assert float(x.grad.abs().max()) < 1e-4
    else:
        assert float(x.grad.abs().max()) > 1e-2


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("normalizer", ["gn+ws", "bcn-micro+ws"])
def test_the_converted_model_is_right_at_one_image_and_said_to_be(name, normalizer):
    model = build_any(name)
    size = 64
    assert not diagnosed(model, 1, size).ok
    converted, _ = bl.convert(model, normalizer, example=example_inputs(model, 1, size))
    said = diagnose(converted, example_inputs(model, 1, size), images_per_forward=1, images_per_step=64)
    assert said.ok, said
    assert train_once(converted, 1, size)[0] is None


def test_group_norms_of_detectors_are_fine():
    from torchvision.models.detection import fcos_resnet50_fpn

    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=64)
    said = diagnosed(model, 1, 64)
    groups = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    assert len(groups) == 8
    assert groups.isdisjoint(finding.layer for finding in said.findings)


def test_a_norm_of_timm_that_derives_from_no_batch_norm_but_uses_the_batch():
    model = timm.create_model("resnet10t", norm_layer=timm.layers.EvoNorm2dB0, pretrained=False)
    said = diagnosed(model, 1, 32)
    assert raising(said)
    assert train_once(model, 1, 32)[0] in raising(said)
