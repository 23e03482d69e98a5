"""SkipInit at the end of every residual branch, or alpha and beta at its ends, where it is asked for."""

import copy

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
from batchless.models.cifar_resnet import CifarBlock
from batchless.nn import parse_normalizer
from batchless.nn.branch_scale import RELU_VARIANCE, branch_betas
from batchless.surgery.residual import branch_scales, residual_ends

SKIP = "none(skip=skip-init)+sws"
SCALED = "none(skip=alpha-beta)+sws"
ALPHA = 0.2


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
    with pytest.raises(
        ValueError, match=r"none\(skip\) got 'zero': expected 'as-built' or 'skip-init' or 'alpha-beta'"
    ):
        parse_normalizer("none(skip=zero)")


def block_variances(model: nn.Module, x: Tensor) -> tuple[list[nn.Module], list[float]]:
    """The residual blocks, and the variance of each one's output over images, channels and positions."""
    kinds = (CifarBlock, torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck)
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    found: list[float] = []
    for block in blocks:
        block.register_forward_hook(lambda module, given, output: found.append(float(output.var())))
    with torch.no_grad():
        model(x)
    return blocks, found


@pytest.mark.parametrize(
    ("network", "tolerance"), [("cifar_resnet20", 0.1), ("resnet18_32", 0.2), ("resnet50_32", 0.2)]
)
def test_the_variance_after_each_block_is_the_predicted_one(network, tolerance):
    """On noise: `Var[x] = beta^2 Var[relu(z)]`. The wide ones end in maps of 4x4, at whose borders zeros are convolved."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    plain = build_model(network, num_classes=10)
    shortcuts = [
        bool(len(block.shortcut)) if isinstance(block, CifarBlock) else block.downsample is not None
        for block in block_variances(plain, x)[0]
    ]
    betas = branch_betas([*shortcuts, False], alpha=ALPHA)
    _, found = block_variances(bl.convert(plain, SCALED, example=x)[0], x)
    assert len(found) == len(betas) - 1 > 8 - 1
    for place, (variance, beta) in enumerate(zip(found, betas[1:], strict=True)):
        assert variance == pytest.approx(beta**2 * RELU_VARIANCE, rel=tolerance), place
    _, without = block_variances(bl.convert(build_model(network, num_classes=10), "none+sws", example=x)[0], x)
    assert max(without) > 2 * max(found)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_block_is_the_formula(place):
    """`relu(shortcut + alpha f(x / beta))`, in a transition block the shortcut's convolution sees `x / beta` too."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plain = build_model("cifar_resnet14", num_classes=10).double()
    block = bl.convert(plain, f"none(skip=alpha-beta,alpha={ALPHA})+sws(gamma=1)", example=x)[0].blocks[place]
    beta = branch_betas([False, False, True, False, True, False], alpha=ALPHA)[place]
    h = torch.randn(2, block.conv1.in_channels, 8, 8, dtype=torch.float64).relu()

    def convolved(layer: nn.Module, input: Tensor) -> Tensor:
        weight = scaled_weight(layer.weight)
        return functional.conv2d(input, weight, layer.bias, layer.stride, layer.padding)

    for layer in (block.conv1, *block.shortcut[:1]):  # biases start at 0, where nothing tells them apart
        nn.init.normal_(layer.bias)
    branch = convolved(block.conv2, functional.relu(convolved(block.conv1, h / beta)))
    shortcut = convolved(block.shortcut[0], h / beta) if len(block.shortcut) else h
    torch.testing.assert_close(block(h), functional.relu(shortcut + ALPHA * branch), rtol=1e-10, atol=1e-12)


def scaled_weight(weight: Tensor) -> Tensor:
    """Brock et al., eq. 3, gamma 1; eps as timm adds it."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred / (rows.var(1, correction=0, keepdim=True) + 1e-6).sqrt() / rows.shape[1] ** 0.5).view_as(weight)


def test_scaled_branches_are_copied_folded_exported_and_loaded():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model, report = bl.convert(build_model("cifar_resnet8", num_classes=3), SCALED, example=x)
    assert "(relu) times 0.2000" in str(report)
    for parameter in model.parameters():  # biases too
        nn.init.normal_(parameter, std=0.1)
    model.eval()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    folded = bl.fold(model)
    assert {type(module).__module__.split(".")[0] for module in folded.modules() if not list(module.children())} == {
        "torch"
    }
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    again, _ = bl.convert(build_model("cifar_resnet8", num_classes=3), SCALED, example=x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), expected)


@pytest.mark.parametrize(
    ("name", "build", "message"),
    [
        ("none(skip=alpha-beta)", None, r"write none\(skip=alpha-beta\)\+sws"),
        ("none(skip=alpha-beta)+ws", None, r"write none\(skip=alpha-beta\)\+sws"),
        ("none(alpha=0.1)+sws", None, r"none\(alpha\) is of none\(skip=alpha-beta\) only"),
        ("none(skip=alpha-beta,alpha=0)+sws", None, r"none\(alpha\) must be positive, got 0"),
        (SCALED, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "no residual block of a known type"),
        (SCALED, lambda: timm.create_model("resnet10t"), r"layer1\.0 is a timm.* use skip=skip-init"),
        (SCALED, lambda: with_silu(torchvision.models.resnet18()), r"layer1\.0\.relu is no ReLU"),
    ],
)
def test_what_has_no_alpha_and_beta_is_refused(name, build, message):
    with pytest.raises(ValueError, match=message):
        bl.convert(build() if build else build_model("cifar_resnet8", num_classes=3), name)


def with_silu(model: nn.Module) -> nn.Module:
    model.layer1[0].relu = nn.SiLU()
    return model


def test_a_branch_that_is_skipped_cannot_be_scaled():
    with pytest.raises(ValueError, match=r"blocks\.1\.conv2 is not reparameterized, so that .* cannot scale"):
        bl.convert(
            build_model("cifar_resnet8", num_classes=3), SCALED, skip=lambda module, name: name == "blocks.1.conv2"
        )


def test_networks_side_by_side_each_begin_anew():
    pair = nn.ModuleDict({name: build_model("cifar_resnet14", num_classes=3) for name in ("left", "right")})
    scales = branch_scales(pair, alpha=ALPHA)
    own = branch_scales(pair["left"], alpha=ALPHA)
    assert scales == {f"{side}.{name}": value for side in ("left", "right") for name, value in own.items()}
    assert len(own) == 2 * 6 + 2
