import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchless as bl
from batchless.models import build_model

SMALL = ["cifar_resnet8", "timm:test_resnet", "torchvision:shufflenet_v2_x0_5"]
NORMALIZERS = ["bn", "frozen-bn", "sync-bn+ws", "gn+ws", "ln+ws", "in+ws", "bcn+ws", "bcn-micro+ws", "none+sws"]
OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.modules.instancenorm._InstanceNorm)


@pytest.mark.parametrize("name", [*SMALL, "timm:resnet18.a1_in1k", "torchvision:googlenet"])
def test_a_model_is_built_with_batch_norm_and_gives_scores_of_the_classes(name):
    model = build_model(name, num_classes=7)
    assert model.training
    assert any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not any(isinstance(module, OTHER_NORMS) for module in model.modules())
    scores = model(torch.randn(2, 3, 64, 64))
    assert scores.shape == (2, 7)
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_it_converts_to_every_normalizer_without_leftovers(name, normalizer):
    model = build_model(name, num_classes=7)
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    images = torch.randn(2, 3, 64, 64)
    converted, report = bl.convert(model, normalizer, example=images, strict=True)
    assert not report.skipped
    left = sum(isinstance(module, _BatchNorm) for module in converted.modules())
    assert left == (norms if normalizer == "bn" else 0)
    scores = converted.train()(images)
    scores.square().mean().backward()
    assert scores.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model("cifar_resnet8", num_classes=3).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("timm:resnet81", "timm:resnet18"),
        ("timm:resnet18.a9_in1k", "timm:resnet18.a1_in1k"),
        ("torchvision:ResNet50", "torchvision:resnet50"),
        ("torchvision:fcn_resnet50", "torchvision:resnet50"),
        ("resnet50", "timm:resnet50"),
        ("cifar_resnt20", "cifar_resnet20"),
        ("cifar-resnet20", "cifar_resnet20"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name, nearest):
    with pytest.raises(ValueError, match=r"^unknown model") as caught:
        build_model(name, num_classes=2)
    message = str(caught.value)
    assert repr(name) in message
    assert nearest in message.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert "timm:<name>" in message
    assert "torchvision:<name>" in message
    assert "cifar_resnet<depth>" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["", ":", "timm", "zzzzqq", "cifar_resnet20 ", "cifar_resnet-8"])
def test_a_name_of_nothing_tells_what_is_possible(name):
    with pytest.raises(ValueError, match=r"expected timm:<name> .*, torchvision:<name> .*, cifar_resnet<depth>"):
        build_model(name, num_classes=2)


def test_a_wrong_depth_is_refused():
    with pytest.raises(ValueError, match=r"6 n \+ 2 .*got 9"):
        build_model("cifar_resnet9", num_classes=2)
