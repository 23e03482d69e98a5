"""A model built with `norm_layer(name)` is the model that `convert(plain model, name)` gives."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

import batchless as bl
from batchless.adapters import norm_layer
from batchless.nn import BatchChannelNorm

NAMES = [
    *("gn", "gn(groups=16)", "ln", "in", "bn", "sync-bn", "frozen-bn"),
    *("bcn", "bcn(groups=8,eps=1e-4)", "bcn-micro", "bcn-micro(memory=50,warmup=false)"),
]
BUILDERS = {
    "resnet18": torchvision.models.resnet18,
    "resnet50, zero": lambda **more: torchvision.models.resnet50(zero_init_residual=True, **more),
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "regnet_y_400mf": torchvision.models.regnet_y_400mf,
    "timm resnet18": lambda **more: timm.create_model("resnet18", **more),
    "timm resnet26": lambda **more: timm.create_model("resnet26", **more),
    "timm seresnet18": lambda **more: timm.create_model("seresnet18", **more),
}


def assert_equals_converted(build, name, **settings):
    torch.manual_seed(0)
    built = build(norm_layer=norm_layer(name, **settings))
    torch.manual_seed(0)
    converted, _ = bl.convert(build(), name)
    state, expected = built.state_dict(), converted.state_dict()
    assert list(state) == list(expected)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        outputs = []
        for model in (built.train(mode), converted.train(mode)):
            torch.manual_seed(1)  # dropout
            outputs.append(model(images))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
    return built


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_converted_model_for_every_name(name):
    assert_equals_converted(torchvision.models.resnet18, name)


@pytest.mark.parametrize("name", ["gn", "bcn-micro"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_equals_the_converted_model_for_every_builder(builder, name):
    assert_equals_converted(BUILDERS[builder], name)


@pytest.mark.parametrize("name", ["gn", "bcn", "bn"])
def test_settings_of_the_replaced_batch_norm(name):
    assert_equals_converted(torchvision.models.mobilenet_v3_small, name, eps=1e-3, momentum=0.01)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_zero_gains_go_to_the_groups(library):
    if library == "torchvision":
        model = torchvision.models.resnet50(zero_init_residual=True, norm_layer=norm_layer("bcn-micro"))
        last = "bn3"
    else:
        model, last = timm.create_model("resnet18", zero_init_last=True, norm_layer=norm_layer("bcn-micro")), "bn2"
    for name, layer in model.named_modules():
        if isinstance(layer, BatchChannelNorm):
            assert bool((layer.batch_norm.weight == 1).all()), name
            is_last = name.startswith("layer") and name.endswith(last)
            assert layer.weight.unique().tolist() == [0.0 if is_last else 1.0], name


def test_a_builders_own_settings_win():
    build = norm_layer("gn", eps=1e-3)
    assert build(64, eps=1e-4).eps == 1e-4
    assert build(64).eps == 1e-3
    assert build(64, device="meta", dtype=torch.float64).weight.is_meta
    assert build(64, dtype=torch.float64).weight.dtype == torch.float64


COMBINED = ["efficientnet_b0", "mobilenetv2_100", "resnetv2_18", "densenet121", "regnetx_002", "skresnet18", "dpn48b"]


@pytest.mark.parametrize("name", COMBINED)
def test_refuses_where_the_layer_must_hold_the_activation(name):
    with pytest.raises(ValueError, match="one layer for normalization and activation") as refused:
        timm.create_model(name, norm_layer=norm_layer("gn(groups=8)"))
    assert "batchless.convert(model, 'gn(groups=8)')" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_refuses_arguments_of_such_a_layer():
    with pytest.raises(ValueError, match=r"it passes apply_act, inplace"):
        norm_layer("gn")(64, apply_act=False, inplace=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gn+ws", r"use batchless\.convert\(model, 'gn\+ws'\)"),
        ("none", "biases that a model without normalization needs"),
        ("gm", "did you mean"),
    ],
)
def test_refuses_a_name(name, message):
    with pytest.raises(ValueError, match=message):
        norm_layer(name)


def test_models_that_keep_it_can_be_copied_and_pickled():
    model = torchvision.models.resnet18(norm_layer=norm_layer("gn"), num_classes=2)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(isinstance(m.bn1, nn.GroupNorm) for m in (copied, loaded))
    assert isinstance(loaded._norm_layer(8), nn.GroupNorm)
