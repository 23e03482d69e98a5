"""SkipInit at the end of every residual branch, where it is asked for."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import batchless as bl
from batchless import nn as bnn
from batchless.federated.algorithms import FedWon, resolve_normalizer
from batchless.models import build_model
from batchless.nn import parse_normalizer
from batchless.surgery.residual import residual_ends

SKIP = "none(skip=skip-init)+sws"


def ends(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is bnn.SkipInit}


def shortcuts_only(model: nn.Module, x: Tensor) -> Tensor:
    """The CIFAR ResNet as it is when no branch adds anything: `h <- relu(shortcut(h))`, written from He et al., section 4.2."""
    h = functional.relu(model.conv1(x))
    for block in model.blocks:
        h = functional.relu(block.shortcut[0](h) if len(block.shortcut) else h)
    return model.fc(h.mean((2, 3)))


def test_every_block_starts_as_its_shortcut():
    torch.manual_seed(0)
    model = build_model("cifar_resnet14", num_classes=10).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    converted, report = bl.convert(model, SKIP, example=x)
    assert ends(converted) == {f"blocks.{i}.bn2" for i in range(6)}
    assert str(report).count("ends a residual branch: a scalar that starts at 0") == 6
    torch.testing.assert_close(converted(x), shortcuts_only(converted, x), rtol=1e-12, atol=1e-12)


def test_the_signal_does_not_grow_with_depth():
    """`h <- relu(h + f(h))` grows by its branch in every block; with SkipInit a block without projection changes nothing."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16, dtype=torch.float64)
    growth = {}
    for name in (SKIP, "none+sws"):
        converted, _ = bl.convert(build_model("cifar_resnet32", num_classes=10).double(), name, example=x)
        before = functional.relu(converted.conv1(x))
        after = converted.blocks[:5](before)  # one width, no projection
        growth[name] = float((after.square().mean() / before.square().mean()).detach())
    assert growth[SKIP] == pytest.approx(1, abs=1e-12)
    assert growth["none+sws"] > 3


def test_the_scalars_learn_and_branches_come_alive():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model, _ = bl.convert(build_model("cifar_resnet8", num_classes=3), SKIP, example=x)
    gains = [module.gain for module in model.modules() if isinstance(module, bnn.SkipInit)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    assert all(float(gain.detach().abs()) > 0 for gain in gains)
    assert all(block.conv1.weight.grad.abs().sum() > 0 for block in model.blocks)
    torch.testing.assert_close(bl.fold(model.eval())(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "last", "blocks"),
    [
        (lambda: torchvision.models.resnet18(num_classes=3), "bn2", 8),
        (lambda: torchvision.models.resnet50(num_classes=3), "bn3", 16),
        (lambda: timm.create_model("resnet10t", num_classes=3), "bn2", 4),
    ],
)
def test_the_blocks_of_torchvision_and_timm_are_known(build, last, blocks):
    found = residual_ends(build())
    assert len(found) == blocks
    assert {name.rpartition(".")[2] for name in found} == {last}


def test_by_default_the_network_decides():
    x = torch.randn(1, 3, 16, 16)
    assert not ends(bl.convert(build_model("cifar_resnet8", num_classes=3), "none+sws", example=x)[0])
    assert str(parse_normalizer("none(skip=as-built)+sws")) == "none+sws"
    assert str(parse_normalizer(SKIP)) == SKIP
    assert resolve_normalizer(FedWon(), SKIP) == SKIP


def test_a_network_without_known_blocks_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="Sequential has no residual block of a known type"):
        bl.convert(model, SKIP)
    with pytest.raises(ValueError, match=r"none\(skip\) got 'zero': expected 'as-built' or 'skip-init'"):
        parse_normalizer("none(skip=zero)")
