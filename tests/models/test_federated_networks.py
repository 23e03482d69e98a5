"""The networks of the federated papers: their sizes in the literature, and their conversion to what the papers compare."""

import math

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchless as bl
from batchless.models import DigitsCNN, build_any, build_model, example_inputs
from batchless.models.example import built_for
from batchless.nn import ScaledWSConv2d, SkipInit

SIZES = {"digits_cnn": 28, "digits_cnn_32": 32, "fedbn_alexnet": 64, "resnet18_32": 32, "mobilenet_v2_32": 32}
BATCH_FREE = ["gn", "ln", "none+sws", "none", "bcn-micro+ws", "gn+ws"]


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("digits_cnn", 14_219_210),  # Flower's FedBN baseline names the same number; 14,213,578 without BatchNorm
        ("digits_cnn_32", 14_219_210 + 2048 * 128 * (8 * 8 - 7 * 7)),
        ("fedbn_alexnet", 57_044_810 + 18_688),  # without BatchNorm, and its affine
        ("resnet18_32", 11_173_962),  # the usual CIFAR-10 ResNets, such as kuangliu/pytorch-cifar's
        ("resnet34_32", 21_282_122),
        ("resnet50_32", 23_520_842),
        ("mobilenet_v2_32", 2_236_682),  # strides have no parameters: torchvision's at 10 classes
        ("torchvision:resnet50", 23_528_522),
    ],
)
def test_parameter_counts_are_those_of_the_literature(name, parameters):
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    assert size(model) == parameters


@pytest.mark.parametrize(("name", "without"), [("digits_cnn", 14_213_578), ("fedbn_alexnet", 57_044_810)])
def test_without_normalization_only_the_affine_maps_are_gone(name, without):
    model = build_model(name, num_classes=10)
    converted, report = bl.convert(model, "none+sws", example=torch.rand(2, 3, SIZES[name], SIZES[name]), strict=True)
    assert size(converted) == without
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(isinstance(module, ScaledWSConv2d) for module in converted.modules()) == len(convolutions)
    assert all(type(module) is nn.Linear for name, module in converted.named_modules() if name.startswith("fc"))
    assert not report.skipped


@pytest.mark.parametrize("normalizer", BATCH_FREE)
@pytest.mark.parametrize("name", SIZES)
def test_one_image_trains_where_no_statistics_are_of_the_batch(name, normalizer):
    torch.manual_seed(0)
    images = torch.randn(1, 3, SIZES[name], SIZES[name])
    model, report = bl.convert(build_model(name, num_classes=10), normalizer, example=images, strict=True)
    assert not report.skipped
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    scores = model.train()(images)
    scores.square().mean().backward()
    assert scores.shape == (1, 10)
    assert scores.isfinite().all()
    for qualified, parameter in model.named_parameters():
        assert parameter.grad is not None, qualified
        assert parameter.grad.isfinite().all(), qualified


@pytest.mark.parametrize("name", ["digits_cnn", "fedbn_alexnet"])
def test_layer_norm_is_over_features_after_linear_layers_and_one_group_on_feature_maps(name):
    model = build_model(name, num_classes=10)
    converted, _ = bl.convert(model, "ln", example=torch.rand(1, 3, SIZES[name], SIZES[name]), strict=True)
    for qualified, module in model.named_modules():
        new = converted.get_submodule(qualified)
        if isinstance(module, nn.BatchNorm1d):
            assert type(new) is nn.LayerNorm
            assert new.normalized_shape == (module.num_features,)
        elif isinstance(module, nn.BatchNorm2d):
            assert type(new) is nn.GroupNorm
            assert new.num_groups == 1


@pytest.mark.parametrize("name", ["digits_cnn", "fedbn_alexnet"])
def test_batch_norm_after_linear_layers_cannot_train_on_one_image(name):
    model = build_model(name, num_classes=10)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.rand(1, 3, SIZES[name], SIZES[name]))


@pytest.mark.parametrize(("name", "positions"), [("resnet18_32", 4), ("resnet50_32", 4), ("mobilenet_v2_32", 4)])
def test_small_images_keep_some_space_to_the_end(name, positions):
    model = build_model(name, num_classes=10).eval()
    seen = []
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    last.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2:]))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    assert seen == [(positions, positions)]


def test_the_digits_network_is_built_for_one_image_size():
    model = build_model("digits_cnn", num_classes=10)
    assert built_for(model) == " (it is built for 28)"
    with pytest.raises(ValueError, match=r"built for images of 28x28, got 32x32: .*digits_cnn_32"):
        model(torch.rand(2, 3, 32, 32))
    assert DigitsCNN(10, image_size=8).eval()(torch.rand(1, 3, 8, 8)).shape == (1, 10)
    with pytest.raises(ValueError, match="image_size is 4 or more, got 3"):
        DigitsCNN(10, image_size=3)


def last_gains(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and not module.weight.any()]


@pytest.mark.parametrize(
    ("name", "branches"), [("resnet18_32", 8), ("resnet34_32", 16), ("resnet50_32", 16), ("mobilenet_v2_32", 10)]
)
def test_zero_init_makes_every_residual_branch_a_skip_init(name, branches):
    assert not last_gains(build_model(name, num_classes=10))
    model = build_model(f"{name}_zero_init", num_classes=10)
    assert len(last_gains(model)) == branches
    converted, _ = bl.convert(model, "none+sws", example=torch.rand(1, 3, 32, 32), strict=True)
    assert sum(isinstance(module, SkipInit) for module in converted.modules()) == branches


def test_without_normalization_a_residual_networks_variance_doubles_per_block_unless_branches_begin_at_zero():
    def growth(name):
        torch.manual_seed(0)
        images = torch.randn(4, 3, 32, 32)
        model, _ = bl.convert(build_model(name, num_classes=10), "none+sws", example=images)
        variances = []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage.register_forward_hook(
                lambda module, inputs, output: variances.append(output.var(dim=(0, 2, 3)).mean())
            )
        with torch.no_grad():
            model(images)
        return float(variances[-1] / variances[0])

    assert math.log2(growth("resnet18_32")) == pytest.approx(
        6, abs=1.5
    )  # two blocks in each of the three stages after it
    assert growth("resnet18_32_zero_init") == pytest.approx(1, abs=0.5)


def test_any_model_by_these_names():
    assert build_any("digits_cnn").fc3.out_features == 10
    assert example_inputs("digits_cnn", 1, 28)[0].shape == (1, 3, 28, 28)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("digitcnn", "digits_cnn"), ("alexnet_fedbn", "fedbn_alexnet"), ("resnet18_zero_init", "resnet18_32_zero_init")],
)
def test_a_name_nearly_right(name, nearest):
    with pytest.raises(ValueError, match=nearest):
        build_model(name, num_classes=10)
