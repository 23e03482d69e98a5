"""What a conversion carries over from the layers it replaces, and with what its new layers start."""

import math

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import batchless as bl
import batchless.nn as bnn
import reference

CHANNELS = 12


def images(samples: int = 3, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 1.5 * torch.randn(samples, channels, size, size, generator=generator, dtype=torch.float64) + 0.5


def randomized(model: nn.Module) -> nn.Module:
    """`model` in float64, after giving batch normalizations an affine map and statistics that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.double().modules():
            if "BatchNorm" in type(module).__name__:
                for name, centre in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                    value = getattr(module, name)
                    if value is not None:
                        value.copy_(centre + torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5)
    return model


def pair(
    *, bias: bool = False, zero_gain: bool = False, norm: type[nn.Module] = nn.BatchNorm2d, **options
) -> nn.Module:
    """A convolution and a normalization with random statistics and affine map."""
    model = randomized(nn.Sequential(nn.Conv2d(3, CHANNELS, 3, bias=bias), norm(CHANNELS, **options)))
    if zero_gain:
        nn.init.zeros_(model[1].weight)
    return model.eval()


def same(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bn", "gn", "bcn-micro", "none", "gn+ws", "none+sws", "bcn+wn", "in+cwn"])
def test_weights_are_carried_over_bit_by_bit(name):
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.linear = pair(bias=True), nn.Linear(CHANNELS, 4).double()
            self.predict = nn.Conv2d(CHANNELS, 2, 1).double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x)
            return self.linear(x.mean((2, 3))), self.predict(x)

    model = Classifier()
    converted, _ = bl.convert(model, name, example=images())
    for key in ("body.0.weight", "body.0.bias", "linear.weight", "linear.bias", "predict.weight", "predict.bias"):
        same(converted.state_dict()[key], model.state_dict()[key])


# Affine maps


@pytest.mark.parametrize("name", ["gn", "gn+ws", "ln", "in", "in+sws", "sync-bn", "frozen-bn", "frozen-bn+ws", "bn+ws"])
def test_the_affine_map_is_the_batch_normalizations(name):
    for norm in (nn.BatchNorm2d, FrozenBatchNorm2d):
        model = pair(norm=norm)
        converted, _ = bl.convert(model, name)
        same(converted[1].weight.data, model[1].weight.data)
        same(converted[1].bias.data, model[1].bias.data)


@pytest.mark.parametrize("name", ["bcn", "bcn-micro", "bcn+ws", "bcn-micro+ws"])
def test_the_inner_affine_map_of_bcn_is_the_batch_normalizations_and_the_outer_is_none(name):
    model = pair()
    converted, _ = bl.convert(model, name)
    same(converted[1].batch_norm.weight.data, model[1].weight.data)
    same(converted[1].batch_norm.bias.data, model[1].bias.data)
    same(converted[1].weight.data, torch.ones(6, dtype=torch.float64))
    same(converted[1].bias.data, torch.zeros(6, dtype=torch.float64))


def test_a_normalization_without_affine_map_gets_none():
    model = pair(affine=False)
    for name in ("gn", "ln", "in", "sync-bn"):
        converted, _ = bl.convert(model, name)
        assert list(converted[1].parameters()) == []
    for name in ("bcn", "bcn-micro"):
        converted, _ = bl.convert(model, name)
        assert list(converted[1].parameters()) == []
    converted, _ = bl.convert(model, "none")
    same(converted[0].bias.data, torch.zeros(CHANNELS, dtype=torch.float64))
    converted, _ = bl.convert(model, "frozen-bn")
    torch.testing.assert_close(converted(images()), model(images()))


@pytest.mark.parametrize("name", ["gn", "ln", "in", "bcn-micro", "sync-bn", "frozen-bn"])
def test_eps_is_the_batch_normalizations(name):
    converted, _ = bl.convert(pair(eps=0.25), name)
    assert converted[1].eps == 0.25


def test_settings_of_bcn_reach_the_layer():
    converted, _ = bl.convert(pair(momentum=0.3), "bcn(groups=4,eps=0.5)")
    layer = converted[1]
    assert (layer.num_groups, layer.eps, layer.batch_norm.eps, layer.batch_norm.momentum) == (4, 0.5, 0.5, 0.3)
    assert not layer.batch_norm.sync
    assert bl.convert(pair(), "bcn(sync=true)")[0][1].batch_norm.sync
    converted, _ = bl.convert(pair(), "bcn-micro(groups=3,memory=70,update=forward,warmup=false)")
    layer = converted[1]
    assert layer.num_groups == 3
    assert (float(layer.batch_norm.memory), layer.batch_norm.update, layer.batch_norm.warmup) == (70, "forward", False)


def test_momentum_is_the_batch_normalizations():
    assert bl.convert(pair(momentum=0.3), "sync-bn")[0][1].momentum == 0.3
    assert bl.convert(pair(norm=FrozenBatchNorm2d), "bn")[0][1].momentum == 0.1  # it has none
    averaging = pair(momentum=None)
    for name in ("sync-bn", "bcn"):
        converted, report = bl.convert(averaging, name)
        assert getattr(converted[1], "batch_norm", converted[1]).momentum == 0.1
        assert report.entries[1].detail.endswith("; momentum 0.1 in place of a cumulative average")
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(averaging)
    assert bl.convert(synchronized, "bn")[0][1].momentum is None


# Zero gains


def test_a_zero_gain_goes_to_the_groups_of_bcn():
    for name in ("bcn", "bcn-micro", "bcn-micro+ws"):
        converted, report = bl.convert(pair(zero_gain=True), name)
        layer = converted[1]
        same(layer.weight.data, torch.zeros(6, dtype=torch.float64))
        same(layer.batch_norm.weight.data, torch.ones(CHANNELS, dtype=torch.float64))
        assert "zero gain moved to the groups" in report.entries[1].detail
        assert not converted(images()).any()
        converted(images()).sum().backward()
        # 400 times this was measured with a zero gain before the second step
        assert float(converted[0].weight.grad.abs().max()) == 0
        assert 0 < float(layer.weight.grad.abs().max()) < 1e3


def test_a_gain_that_is_zero_in_some_channels_only_is_no_zero_gain():
    model = pair()
    with torch.no_grad():
        model[1].weight[3:] = 0
    converted, _ = bl.convert(model, "bcn-micro")
    same(converted[1].batch_norm.weight.data, model[1].weight.data)
    same(converted[1].weight.data, torch.ones(6, dtype=torch.float64))
    assert type(bl.convert(model, "none")[0][1]) is nn.Identity


def test_a_zero_gain_becomes_a_scalar_without_normalization():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)).double()
            nn.init.zeros_(self.branch[1].weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    for name in ("none", "none+sws"):
        converted, report = bl.convert(Residual(), name, example=images())
        assert type(converted.branch[1]) is bnn.SkipInit
        assert "zero gain became a scalar" in report.entries[1].detail
        same(converted(images()), images())
        converted(images()).square().sum().backward()
        assert converted.branch[1].gain.grad.abs() > 0
        with torch.no_grad():
            converted.branch[1].gain.fill_(0.5)
        torch.testing.assert_close(converted(images()), images() + 0.5 * converted.branch[0](images()))


def test_a_zero_gain_stays_a_zero_gain_elsewhere():
    for name in ("gn", "ln+ws", "in", "sync-bn", "frozen-bn"):
        converted, _ = bl.convert(pair(zero_gain=True), name)
        assert not converted[1].weight.any()


# Running statistics


def is_carried(converted: nn.Module, model: nn.Module) -> bool:
    norm = getattr(converted[1], "batch_norm", converted[1])
    carried = torch.equal(norm.running_mean, model[1].running_mean) and torch.equal(
        norm.running_var, model[1].running_var
    )
    fresh = not norm.running_mean.any() and bool((norm.running_var == 1).all())
    assert carried != fresh
    return carried


@pytest.mark.parametrize("example", [images(), None], ids=["example", "structure"])
@pytest.mark.parametrize("act", ["bn", "frozen-bn", "sync-bn", "bcn", "bcn-micro"])
def test_running_statistics_are_carried_over_only_where_the_convolution_keeps_its_function(act, example):
    model = pair()
    converted, report = bl.convert(model, act, example=example)
    assert is_carried(converted, model)
    assert not any("recalibrate" in note for note in report.notes)
    for weight in ("ws", "sws", "wn", "cwn"):
        converted, report = bl.convert(model, f"{act}+{weight}", example=example)
        assert not is_carried(converted, model)
        assert "statistics start fresh" in report.entries[1].detail
        assert any("recalibrate" in note for note in report.notes)
    # A convolution that could not be reparameterized, or was not to be, keeps its function.
    converted, report = bl.convert(model, f"{act}+ws", example=example, skip=lambda module, name: name == "0")
    assert is_carried(converted, model)
    pointwise = randomized(nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)))
    assert is_carried(bl.convert(pointwise, f"{act}+ws", example=example)[0], pointwise)


def test_statistics_of_a_frozen_normalization_start_fresh_too_behind_a_reparameterized_convolution():
    for norm in (FrozenBatchNorm2d, bnn.FrozenBatchNorm):
        model = pair(norm=norm)
        converted, _ = bl.convert(model, "frozen-bn+ws")
        assert not is_carried(converted, model)
        assert is_carried(bl.convert(model, "frozen-bn")[0], model)


def test_without_running_statistics_there_are_none_to_carry():
    model = pair(track_running_stats=False)
    for name in ("bcn", "bcn-micro", "sync-bn", "frozen-bn"):
        converted, report = bl.convert(model, name)
        assert "statistics start fresh" in report.entries[1].detail
        norm = getattr(converted[1], "batch_norm", converted[1])
        assert not norm.running_mean.any()


@pytest.mark.parametrize("counted", [0, 1000])
def test_carried_estimates_outlive_the_first_training_forward(counted):
    model = pair()  # a checkpoint's counter may say 0 whatever its statistics are
    model[1].num_batches_tracked.fill_(counted)
    with torch.no_grad():
        model[1].running_mean.fill_(5)
    converted, _ = bl.convert(model, "bcn-micro")
    converted.train()(images(1))
    mean = converted[1].batch_norm.running_mean
    assert (mean > 4.9).all()
    assert (mean < 5).all()
    fresh, _ = bl.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), "bcn-micro")
    y = fresh[0](images(1))
    fresh.train()(images(1))
    torch.testing.assert_close(fresh[1].batch_norm.running_mean, y.mean((0, 2, 3)).detach())  # the warm-up's first move


def test_a_batch_normalization_that_stays_counts_from_zero_after_its_convolution_changed():
    model = pair()
    model[1].num_batches_tracked.fill_(7)
    assert int(bl.convert(model, "bn+ws")[0][1].num_batches_tracked) == 0
    assert int(bl.convert(model, "bn")[0][1].num_batches_tracked) == 7
    assert int(bl.convert(model, "sync-bn")[0][1].num_batches_tracked) == 7


@pytest.mark.parametrize("name", ["frozen-bn", "sync-bn", "bn"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, FrozenBatchNorm2d, timm.layers.BatchNormAct2d, timm.layers.FrozenBatchNormAct2d]
)
def test_the_evaluation_function_stays_exactly(name, norm):
    model = pair(norm=norm)
    with torch.no_grad():
        expected = model(images())
        converted, _ = bl.convert(model, name, example=images())
        torch.testing.assert_close(converted.eval()(images()), expected, rtol=1e-13, atol=1e-13)
        if name == "frozen-bn":
            torch.testing.assert_close(converted.train()(images()), expected, rtol=1e-13, atol=1e-13)


def test_a_frozen_normalization_trains_nothing():
    converted, _ = bl.convert(pair().train(), "frozen-bn")
    before = {key: value.clone() for key, value in converted[1].state_dict().items()}
    converted(images()).sum().backward()
    assert list(converted[1].parameters()) == []
    assert all(torch.equal(value, before[key]) for key, value in converted[1].state_dict().items())


def test_bcn_in_evaluation_is_channel_normalization_of_the_batch_normalization_it_was():
    model = pair()
    for name in ("bcn", "bcn-micro"):
        converted, _ = bl.convert(model, name)
        ones, zeros = torch.ones(6), torch.zeros(6)
        expected = reference.channel_norm(model(images()).detach(), 6, ones, zeros)
        torch.testing.assert_close(converted(images()).detach(), expected, rtol=1e-10, atol=1e-10)


def test_gn_is_group_normalization_with_the_carried_affine_map():
    model = pair()
    converted, _ = bl.convert(model, "gn(groups=4)")
    y = model[0](images()).detach()
    expected = reference.group_norm(y, 4, model[1].weight.detach(), model[1].bias.detach())
    torch.testing.assert_close(converted(images()).detach(), expected, rtol=1e-10, atol=1e-10)


# Biases in place of a removed normalization


@pytest.mark.parametrize("name", ["none", "none+ws", "none+sws", "none+wn", "none+cwn"])
@pytest.mark.parametrize("example", [images(), None], ids=["example", "structure"])
def test_a_removed_normalizations_bias_goes_to_the_convolution_that_had_none(name, example):
    model = pair()
    converted, report = bl.convert(model, name, example=example)
    same(converted[0].bias.data, model[1].bias.data)
    assert isinstance(converted[0].bias, nn.Parameter)
    assert converted[0].bias is not model[1].bias
    assert report.entries[1].detail == "its bias moved to 0"
    effective = converted[0].effective_weight() if name != "none" else converted[0].weight
    torch.testing.assert_close(converted(images()), F.conv2d(images(), effective, model[1].bias))


def test_a_bias_that_is_there_stays():
    model = pair(bias=True)
    converted, report = bl.convert(model, "none+sws")
    same(converted[0].bias.data, model[0].bias.data)
    assert report.entries[1].detail == "its bias is dropped: 0 has one"


def test_a_linear_layer_gets_the_bias_but_no_reparameterization():
    linear = nn.Sequential(nn.Linear(CHANNELS, 6, bias=False), nn.BatchNorm1d(6))
    model = randomized(nn.Sequential(pair(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *linear))
    converted, _ = bl.convert(model, "none+sws", example=images())
    assert type(converted[3]) is nn.Linear
    same(converted[3].bias.data, model[4].bias.data)


# What reparameterized weights start with


def test_reparameterized_weights_start_from_the_carried_ones():
    model = pair()
    weight = model[0].weight.detach()
    rows = weight.flatten(1)
    centred = (rows - rows.mean(1, keepdim=True)).view_as(weight)
    for name, expected in (
        ("gn+ws", reference.standardized_weight(weight, "timm")),
        ("gn+ws(preset=authors)", reference.standardized_weight(weight, "authors")),
        ("gn+ws(preset=paper,eps=0.01)", reference.standardized_weight(weight, "paper", eps=0.01)),
        ("gn+sws", reference.scaled_standardized_weight(weight, "timm", gamma=1.0)),
        ("gn+sws(gamma=2.5,preset=nfnet)", reference.scaled_standardized_weight(weight, "nfnet", gamma=2.5)),
        ("gn+wn", weight),  # the function is unchanged
        ("gn+cwn", centred),
    ):
        converted, _ = bl.convert(model, name, example=images())
        torch.testing.assert_close(converted[0].effective_weight().detach(), expected, rtol=1e-10, atol=1e-12)
    assert bl.convert(model, "gn+sws")[0][0].gain is None
    same(bl.convert(model, "gn+sws(gain=true)")[0][0].gain.data, torch.ones(CHANNELS, dtype=torch.float64))


# Gammas


class CustomSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Gated(nn.Module):
    """Squeeze-excite on the activation's output."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Functional(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def gamma_behind(*between: nn.Module, name: str = "gn+sws", example: Tensor | None = None) -> tuple[float, str]:
    """Gamma of a convolution behind `between`, and how the report explains it."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    model = nn.Sequential(*stem, *between, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double()
    converted, report = bl.convert(model, name, example=example)
    index = 2 + len(between)
    detail = next(entry.detail for entry in report.entries if entry.name == str(index))
    return converted[index].gamma, detail


def gain(activation) -> float:
    return reference.activation_gain(activation)


RELU = math.sqrt(2 / (1 - 1 / math.pi))
PUBLISHED = 1.7139588594436646


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ((nn.ReLU(),), RELU),
        ((nn.ReLU(inplace=True),), RELU),
        ((Functional(F.relu),), RELU),
        ((Functional(lambda x: x.clone().relu_()),), RELU),
        ((nn.ReLU6(),), gain(F.relu6)),
        ((nn.SiLU(),), gain(F.silu)),
        ((nn.GELU(),), gain(F.gelu)),
        ((nn.GELU(approximate="tanh"),), gain(lambda z: F.gelu(z, approximate="tanh"))),
        ((nn.Hardswish(),), gain(F.hardswish)),
        ((nn.Mish(),), gain(F.mish)),
        ((nn.LeakyReLU(0.3),), gain(lambda z: F.leaky_relu(z, 0.3))),
        ((nn.PReLU(init=0.4),), gain(lambda z: torch.where(z > 0, z, 0.4 * z))),
        ((nn.ELU(0.5),), gain(lambda z: F.elu(z, 0.5))),
        ((nn.Hardtanh(-1, 2),), gain(lambda z: z.clamp(-1, 2))),
        ((nn.ReLU(), nn.MaxPool2d(2, 1)), RELU),
        ((nn.ReLU(), nn.AvgPool2d(2, 1), nn.Dropout(0.5)), RELU),
        ((nn.ReLU(), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1)), RELU),
        ((nn.ReLU(), nn.ChannelShuffle(2)), RELU),
        ((Gated(),), RELU),
        ((Functional(lambda x: x.relu() * x.mean((2, 3), keepdim=True).sigmoid().expand_as(x)),), RELU),
        ((Functional(lambda x: torch.cat([x[:, :2].relu(), x[:, 2:].relu()], 1)),), RELU),
        ((Functional(lambda x: 2 * x.relu()),), RELU),
        ((nn.Identity(),), 1.0),
        ((nn.MaxPool2d(2, 1),), 1.0),
        ((Functional(lambda x: x + x.relu()),), 1.0),
        ((CustomSwish(),), PUBLISHED),
        ((Functional(lambda x: x.clamp(min=0)),), PUBLISHED),
        ((Functional(lambda x: torch.cat([x[:, :2], x[:, 2:].relu()], 1)),), PUBLISHED),
    ],
)
def test_gamma_is_the_gain_of_the_activation_in_the_data_flow(between, expected):
    found, detail = gamma_behind(*between, example=images(size=12))
    assert found == pytest.approx(expected, rel=1e-6)
    assert detail.startswith(f"gamma {expected:.4f} (")
    assert ("unknown" in detail) == (expected == PUBLISHED)
    assert ("no activation" in detail) == (expected == 1.0)


def test_gamma_of_a_first_convolution_is_one():
    converted, report = bl.convert(pair(), "none+sws", example=images())
    assert converted[0].gamma == 1.0
    assert report.entries[0].detail == "gamma 1.0000 (no activation before it)"


def test_gamma_of_a_convolution_that_runs_behind_different_activations_is_the_constant():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(F.silu(self.bn(self.conv(F.relu(x))))))

    _, report = bl.convert(Twice().double(), "gn+sws", example=images())
    assert "unknown" in report.entries[0].detail


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ((nn.SiLU(),), gain(F.silu)),
        ((nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)), RELU),
        ((nn.ReLU(), nn.SiLU()), PUBLISHED),
        ((CustomSwish(),), PUBLISHED),
    ],
)
def test_gamma_by_structure_is_that_of_the_containers_only_kind_of_activation(between, expected):
    found, detail = gamma_behind(*between)
    assert found == pytest.approx(expected, rel=1e-6)
    assert ("unknown" in detail) == (expected == PUBLISHED)


def test_gamma_by_name_is_the_constant_or_a_number_for_all():
    for example in (images(size=12), None):
        found, detail = gamma_behind(nn.SiLU(), name="gn+sws(gamma=constant)", example=example)
        assert found == PUBLISHED
        assert detail == "gamma 1.7140 (constant)"
        found, detail = gamma_behind(nn.SiLU(), name="gn+sws(gamma=2)", example=example)
        assert found == 2
        assert detail == "gamma 2.0000 (as set)"


# Groups


@given(
    channels=st.integers(2, 200),
    largest=st.integers(1, 64),
    act=st.sampled_from(["gn", "bcn", "bcn-micro"]),
)
def test_groups_are_the_most_that_divide_the_channels_and_hold_two(channels, largest, act):
    model = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))
    converted, report = bl.convert(model, f"{act}(groups={largest})")
    groups = converted[1].num_groups
    fitting = [g for g in range(1, largest + 1) if channels % g == 0 and (channels // g >= 2 or g == 1)]
    assert groups == max(fitting)
    assert f"{groups} groups of {channels // groups}" in report.entries[1].detail


def test_layer_normalization_of_maps_has_one_group():
    converted, _ = bl.convert(pair(), "ln", example=images())
    assert type(converted[1]) is nn.GroupNorm
    assert converted[1].num_groups == 1


@pytest.mark.parametrize(("name", "told"), [("frozen-bn", True), ("bn", False), ("gn", False)])
def test_a_zero_gain_that_is_frozen_is_told(name, told):
    """timm's residual networks begin so: the branch would stay dead for good."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    nn.init.zeros_(model[3].weight)
    _, report = bl.convert(model, name)
    assert any("1 frozen normalizations have gains of 0" in note for note in report.notes) is told
    assert ("its gain is a constant 0" in str(report)) is told
