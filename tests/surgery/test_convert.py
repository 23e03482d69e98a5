"""Which layers a conversion replaces, which it keeps, and what of the model it leaves as it was."""

import copy
import itertools
import pickle
import warnings

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.ops import FrozenBatchNorm2d

import batchless as bl
import batchless.nn as bnn
from batchless.surgery import ConversionReport, conversion_of

ACTS = ("bn", "frozen-bn", "sync-bn", "gn", "ln", "in", "bcn", "bcn-micro", "none")
WEIGHTS = ("ws", "sws", "wn", "cwn")


class Gate(nn.Module):
    """Squeeze-excite: convolutions that no normalization follows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Block(nn.Module):
    """A residual block with a projection, and functional activations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.gate = Gate(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    """Stem, block, a predictor of maps, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = Block(8, 12)
        self.maps = nn.Conv2d(12, 2, 1)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(self.stem(x))
        return self.classifier(x.mean((2, 3))), self.maps(x)


FOLLOWED = {"stem.0", "block.conv1", "block.conv2", "block.shortcut.0"}
NORMS = {"stem.1", "block.bn1", "block.bn2", "block.shortcut.1"}
ALONE = {"block.gate.reduce", "block.gate.expand", "maps"}


def images(samples: int = 2, size: int = 10) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))


def kinds(model: nn.Module, names: set[str]) -> set[type[nn.Module]]:
    return {type(model.get_submodule(name)) for name in names}


def details(report: ConversionReport, *names: str) -> list[str]:
    found = {entry.name: entry.detail for entry in report.entries}
    return [found[name] for name in names]


def sole_error(message: str) -> str:
    assert "\n" not in message
    return message


by_example_and_structure = pytest.mark.parametrize("example", [images(), None], ids=["example", "structure"])


@by_example_and_structure
@pytest.mark.parametrize(
    ("weight", "kind"),
    [("ws", bnn.WSConv2d), ("sws", bnn.ScaledWSConv2d), ("wn", bnn.WNConv2d), ("cwn", bnn.CWNConv2d)],
)
def test_convolutions_that_a_normalization_follows_get_the_weight_and_no_others(weight, kind, example):
    converted, report = bl.convert(Network(), f"gn+{weight}", example=example)
    assert kinds(converted, FOLLOWED) == {kind}
    assert kinds(converted, NORMS) == {nn.GroupNorm}
    assert kinds(converted, ALONE) == {nn.Conv2d}
    assert type(converted.classifier) is nn.Linear
    assert {entry.name for entry in report.replaced} == FOLLOWED | NORMS
    assert {entry.name for entry in report.kept} == ALONE
    assert set(details(report, *ALONE)) == {"no normalization follows it"}
    assert report.skipped == ()
    assert report.found_by == ("structure" if example is None else "example")


@by_example_and_structure
@pytest.mark.parametrize(
    ("act", "kind"),
    [
        ("bn", nn.BatchNorm2d),
        ("frozen-bn", bnn.FrozenBatchNorm),
        ("sync-bn", bnn.BatchNorm),
        ("gn", nn.GroupNorm),
        ("ln", nn.GroupNorm),
        ("in", nn.InstanceNorm2d),
        ("bcn", bnn.BatchChannelNorm),
        ("bcn-micro", bnn.BatchChannelNorm),
        ("none", nn.Identity),
    ],
)
def test_every_normalization_becomes_the_first_part_and_without_a_second_no_convolution_changes(act, kind, example):
    converted, report = bl.convert(Network(), act, example=example)
    assert kinds(converted, NORMS) == {kind}
    assert kinds(converted, FOLLOWED | ALONE) == {nn.Conv2d}
    assert {entry.name for entry in report.replaced} == (NORMS if act != "bn" else set())
    if act in ("bcn", "bcn-micro"):
        inner = type(converted.block.bn1.batch_norm)
        assert inner is (bnn.EstimatedBatchNorm if act == "bcn-micro" else bnn.BatchNorm)
    if act == "sync-bn":
        assert converted.block.bn1.sync


@pytest.mark.parametrize("name", [*ACTS, *(f"{act}+{weight}" for act, weight in itertools.product(ACTS, WEIGHTS))])
def test_every_pair_of_parts_trains(name):
    converted, _ = bl.convert(Network(), name, example=images())
    classes, maps = converted(images())
    (classes.square().mean() + maps.square().mean()).backward()
    for parameter in converted.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert sum(float(p.grad.abs().sum()) for p in converted.parameters()) > 0


class Noisy(nn.Module):
    """A model that draws random numbers in its forward, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x + torch.randn_like(x)))


@pytest.mark.parametrize("name", ["gn+ws", "bcn-micro+cwn", "none+sws(gain=true)", "bn+ws"])
def test_the_model_given_and_the_random_state_stay_as_they_are(name):
    for model in (Network(), Noisy()):
        model.train()
        modules = {key: (id(m), m.training) for key, m in model.named_modules()}
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        random = torch.get_rng_state()
        example = images()
        converted, _ = bl.convert(model, name, example=example)
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(example, images())
        assert {key: (id(m), m.training) for key, m in model.named_modules()} == modules
        assert conversion_of(model) is None
        assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
        assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.zero_()
        assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


def test_converting_again_gives_an_equal_copy():
    converted, report = bl.convert(Network(), "gn(groups=8)+ws", example=images())
    again, second = bl.convert(converted, "gn( groups = 8 )+ws")
    assert second == report
    assert again is not converted
    assert [type(m) for m in again.modules()] == [type(m) for m in converted.modules()]
    assert {id(p) for p in again.parameters()}.isdisjoint({id(p) for p in converted.parameters()})
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), converted.parameters(), strict=True))


def test_converting_to_another_name_is_an_error_that_names_both():
    converted, _ = bl.convert(Network(), "gn+ws")
    with pytest.raises(
        ValueError, match=r"already converted to 'gn\+ws' .* 'bcn-micro': convert the original model"
    ) as e:
        bl.convert(converted, "bcn-micro")
    sole_error(str(e.value))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_remember_the_conversion(copied):
    converted, _ = bl.convert(Network(), "bcn-micro+ws", example=images())
    conversion = conversion_of(converted)
    assert conversion is not None
    assert conversion.pairs == {
        "stem.0": "stem.1",
        "block.conv1": "block.bn1",
        "block.conv2": "block.bn2",
        "block.shortcut.0": "block.shortcut.1",
    }
    assert conversion_of(copied(converted)) == conversion
    assert "batchless_conversion" not in "".join(converted.state_dict())


def test_state_dict_keys_of_reparameterized_convolutions_are_the_plain_ones():
    model = Network()
    for name in ("gn+ws", "ln+sws", "in+ws", "bn+ws", "frozen-bn+ws"):
        keys = bl.convert(model, name)[0].state_dict().keys()
        lost = {key for key in model.state_dict() if "running" in key or "num_batches" in key}
        assert keys >= model.state_dict().keys() - lost


class NamedConv(nn.Conv2d):
    """A subclass that computes what its base does."""


class DoubledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class NamedNorm(nn.BatchNorm2d):
    """A subclass that computes what its base does."""


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("example", [images(), None], ids=["example", "structure"])
def test_subclasses_are_what_their_base_is_unless_they_override_the_forward(example):
    plain = nn.Sequential(NamedConv(3, 8, 3), NamedNorm(8))
    converted, report = bl.convert(plain, "gn+ws", example=example, strict=True)
    assert [type(layer) for layer in converted] == [bnn.WSConv2d, nn.GroupNorm]
    for conv in (DoubledConv(3, 8, 3), OwnConvForward(3, 8, 3), timm.layers.StdConv2d(3, 8, 3)):
        converted, report = bl.convert(nn.Sequential(conv, nn.BatchNorm2d(8)), "gn+ws", example=example)
        assert type(converted[0]) is type(conv)
        assert details(report, "0") == [f"{type(conv).__name__} overrides forward and no rule knows it"]
        assert [entry.action for entry in report.entries] == ["skipped", "replaced"]
    converted, report = bl.convert(nn.Sequential(nn.Conv2d(3, 8, 3), ShiftedNorm(8)), "gn+ws", example=example)
    assert type(converted[1]) is ShiftedNorm
    assert details(report, "1")[0].startswith("ShiftedNorm overrides forward and no rule knows it")


def test_strict_raises_for_a_batch_normalization_that_is_left_and_only_for_that():
    bl.convert(nn.Sequential(DoubledConv(3, 8, 3), nn.BatchNorm2d(8)), "gn+ws", strict=True)
    bl.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), "gn+ws", strict=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), ShiftedNorm(8))
    bl.convert(model, "gn+ws", strict=True, skip=lambda module, name: name == "1")  # as asked
    message = r"strict: 1 batch normalizations are left that gn\+ws was to replace: 1 \(ShiftedNorm overrides forward"
    with pytest.raises(ValueError, match=message) as error:
        bl.convert(model, "gn+ws", strict=True)
    sole_error(str(error.value))
    converted, _ = bl.convert(model, "gn+ws")
    with pytest.raises(ValueError, match=message):
        bl.convert(converted, "gn+ws", strict=True)


def test_skip_leaves_layers_as_they_are_and_is_asked_by_qualified_name():
    asked = {}

    def skip(module: nn.Module, name: str) -> bool:
        asked[name] = type(module)
        return name in ("block.conv1", "block.bn2")

    converted, report = bl.convert(Network(), "gn+ws", skip=skip)
    assert asked["block.conv1"] is nn.Conv2d
    assert asked["stem.1"] is nn.BatchNorm2d
    assert type(converted.block.conv1) is nn.Conv2d
    assert type(converted.block.bn1) is nn.GroupNorm
    assert type(converted.block.bn2) is nn.BatchNorm2d
    first, second = details(report, "block.conv1", "block.bn2")
    assert first == "skipped as asked"
    assert second == "skipped as asked; its statistics are no longer those of its input"
    assert any("recalibrate" in note for note in report.notes)
    converted, _ = bl.convert(Network(), "none+ws", skip=lambda module, name: isinstance(module, nn.Conv2d))
    assert converted.block.conv1.bias is None


def test_timm_same_padding_keeps_its_padding():
    conv = timm.layers.Conv2dSame(3, 8, 3, stride=2, dilation=2)
    model = nn.Sequential(conv, nn.BatchNorm2d(8))
    for size in (10, 11):
        converted, _ = bl.convert(model, "gn+wn", example=images(size=size))
        assert type(converted[0]) is bnn.WNConv2d
        torch.testing.assert_close(converted[0](images(size=size)), conv(images(size=size)), rtol=1e-5, atol=1e-6)


def test_timm_combined_layers_keep_activation_and_drop():
    act, drop = nn.LeakyReLU(0.3, inplace=True), nn.Dropout(0.5)
    norm = timm.layers.BatchNormAct2d(8, act_layer=None)
    norm.act, norm.drop = act, drop
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    for name in ("gn+ws", "bcn-micro", "none+ws", "sync-bn"):
        converted, report = bl.convert(model, name, example=images())
        assert [entry.was for entry in report.entries] == ["Conv2d", "BatchNormAct2d"]
        assert converted[1].act.negative_slope == 0.3
        assert converted[1].drop.p == 0.5
        converted.eval()
        expected = F.leaky_relu(converted[1].norm(converted[0](images())), 0.3)
        assert torch.equal(converted(images()), expected)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, timm.layers.FrozenBatchNormAct2d])
def test_frozen_normalizations_of_the_libraries_are_batch_normalizations(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8))
    for example in (images(), None):
        converted, report = bl.convert(model, "gn+ws", example=example, strict=True)
        assert len(report.replaced) == 2
        assert sum(isinstance(m, nn.GroupNorm) for m in converted.modules()) == 1
        assert sum(isinstance(m, nn.ReLU) for m in converted.modules()) == (norm is not FrozenBatchNorm2d)


@pytest.mark.parametrize(
    ("norm", "synchronized"),
    [
        (nn.BatchNorm2d(8), nn.SyncBatchNorm.convert_sync_batchnorm),
        (timm.layers.BatchNormAct2d(8), timm.layers.convert_sync_batchnorm),
    ],
    ids=["torch", "timm"],
)
def test_synchronized_normalizations_are_batch_normalizations(norm, synchronized):
    model = synchronized(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    expected = nn.Sequential(nn.Conv2d(3, 8, 3), norm).eval()
    expected.load_state_dict(model.state_dict())
    for name in ("bn", "gn+ws", "sync-bn", "bcn-micro"):
        converted, report = bl.convert(model, name, strict=True)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
        assert not report.skipped
        converted.train()(images())
        if name in ("bn", "sync-bn"):
            converted, _ = bl.convert(model, name)
            torch.testing.assert_close(converted.eval()(images()), expected(images()))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), timm.layers.LayerNorm2d(8)])
def test_other_normalizations_stay_and_the_convolution_before_them_is_reparameterized(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    converted, report = bl.convert(model, "bcn-micro+ws", example=images())
    assert [type(layer) for layer in converted][:2] == [bnn.WSConv2d, type(norm)]
    assert details(report, "1") == ["not a batch normalization"]


@pytest.mark.parametrize("statistics", ["batch", "estimate"])
def test_our_own_normalizations_stay_whole(statistics):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), bnn.BatchChannelNorm(8, statistics=statistics))
    converted, report = bl.convert(model, "gn+ws", example=images(), strict=True)
    assert [(entry.name, entry.action) for entry in report.entries] == [("0", "replaced"), ("1", "kept")]
    assert [type(m) for m in converted[1].modules()] == [type(m) for m in model[1].modules()]


class Siamese(nn.Module):
    """One convolution that feeds two normalizations, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x)) + self.bn2(self.conv(-x))


def test_a_convolution_that_feeds_different_normalizations_is_followed_by_one():
    converted, report = bl.convert(Siamese(), "bcn-micro+ws", example=images())
    assert type(converted.conv) is bnn.WSConv2d
    assert all("statistics start fresh" in detail for detail in details(report, "bn1", "bn2"))
    assert conversion_of(converted).pairs == {}


def test_a_convolution_that_a_normalization_follows_in_some_calls_only_is_no_pair():
    class Sometimes(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(self.conv(x)) + F.relu(self.conv(-x))

    converted, report = bl.convert(Sometimes(), "gn+ws", example=images())
    assert type(converted.conv) is nn.Conv2d
    assert details(report, "conv") == ["its output feeds more than a normalization"]


class Shared(nn.Module):
    """Two convolutions that feed one normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.bn(self.b(x))


def test_convolutions_that_share_a_normalization_are_both_followed_by_it():
    converted, _ = bl.convert(Shared(), "gn+ws", example=images())
    assert kinds(converted, {"a", "b"}) == {bnn.WSConv2d}
    assert conversion_of(converted).pairs == {}


class Between(nn.Module):
    """A convolution whose output is changed, or used, before its normalization sees it."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.conv, self.bn = use, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        match self.use:
            case "in-place":
                y.relu_()
            case "function":
                y = F.relu(y)
            case "also added":
                return self.bn(y) + y
            case "also returned":
                return self.bn(y), {"features": [y]}
        return self.bn(y)


@pytest.mark.parametrize("use", ["in-place", "function", "also added", "also returned"])
def test_a_convolution_whose_output_goes_elsewhere_too_is_no_pair(use):
    converted, report = bl.convert(Between(use), "gn+ws", example=images())
    assert type(converted.conv) is nn.Conv2d
    expected = "no normalization follows it" if use == "function" else "its output feeds more than a normalization"
    assert details(report, "conv") == [expected]
    assert type(bl.convert(Between("nothing"), "gn+ws", example=images())[0].conv) is bnn.WSConv2d


class PreActivation(nn.Module):
    """Declared convolution first, run normalization first; the shortcut is the normalization's input."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.activation, self.relu = activation, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        match self.activation:
            case "module":
                y = self.relu(self.bn1(x))
            case "function":
                y = F.relu(self.bn1(x), inplace=True)
            case "method":
                y = self.bn1(x).flatten(2).relu_().view_as(x)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class CallsByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(input=x))


def test_the_data_flow_tells_pairs_that_the_order_of_declaration_does_not():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation("module"))
    converted, _ = bl.convert(model, "gn+ws", example=images())
    assert type(converted[1].conv1) is bnn.WSConv2d  # bn2 follows it
    assert type(converted[1].conv2) is nn.Conv2d  # the sum follows it
    assert type(converted[0]) is nn.Conv2d  # the sum and bn1 follow it


@pytest.mark.parametrize("activation", ["module", "function", "method"])
def test_without_normalization_an_activation_in_place_does_not_overwrite_the_shortcut(activation):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation(activation), PreActivation(activation)).double()
    converted, _ = bl.convert(model, "none", example=images().double())
    # A module is told not to work in place; before code that does, its input is copied.
    assert type(converted[1].bn1) is (nn.Identity if activation == "module" else nn.ZeroPad1d)
    assert type(converted[1].bn2) is nn.Identity
    x = converted[0](images().double())
    for block in (converted[1], converted[2]):
        x = x + block.conv2(F.relu(block.conv1(F.relu(x))))
    y = converted(images().double())
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    y.sum().backward()


def test_without_normalization_the_output_of_a_convolution_may_be_overwritten():
    class InPlace(CallsByKeyword):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu_()

    converted, _ = bl.convert(InPlace(), "none", example=images())
    assert type(converted.bn) is nn.Identity


def test_without_normalization_code_in_place_does_not_break_the_gradient_of_what_came_before():
    class PostActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(F.relu(self.conv(x)))
            y += 1
            return y

    converted, _ = bl.convert(PostActivation(), "none", example=images())
    converted(images()).sum().backward()
    assert converted.conv.weight.grad.abs().sum() > 0


def test_every_dimension_and_the_transposed_forms_are_converted():
    for dimensions, norm in ((1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        for transposed in ("", "Transpose"):
            conv = getattr(nn, f"Conv{transposed}{dimensions}d")(4, 6, 3, stride=2, groups=2, bias=False)
            model = nn.Sequential(conv, norm(6))
            x = torch.randn(2, 4, *(7,) * dimensions)
            converted, _ = bl.convert(model, "in+ws", example=x)
            assert type(converted[0]) is getattr(bnn, f"WSConv{transposed}{dimensions}d")
            assert type(converted[1]) is getattr(nn, f"InstanceNorm{dimensions}d")
            expected = bnn.standardize_weight(conv.weight, transposed=bool(transposed), groups=2)
            torch.testing.assert_close(converted[0].effective_weight(), expected)
            assert converted(x).shape == model(x).shape


def test_normalizations_of_features_without_space():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.BatchNorm1d(12)
    )
    converted, report = bl.convert(model, "ln+ws", example=images())
    assert [type(converted[i]) for i in (0, 3, 4)] == [nn.Conv2d, nn.Linear, nn.LayerNorm]
    assert "0" in {entry.name for entry in report.kept}
    assert type(bl.convert(model, "ln")[0][4]) is nn.LayerNorm
    assert type(bl.convert(model, "gn")[0][4]) is nn.GroupNorm
    for name in ("in", "in+ws"):
        with pytest.raises(
            ValueError, match=r"^4: instance normalization needs an input with space.* \[N, C\]: use gn or ln"
        ):
            bl.convert(model, name, example=images())
    on_pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=r"^2: instance normalization .* one position wide"):
        bl.convert(on_pooled, "in", example=images())


def test_few_values_per_group_warn_where_the_caller_is_and_one_value_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.warns(UserWarning, match=r"^1: only 2 values per group on the example; fewer groups") as caught:
        _, report = bl.convert(model, "gn", example=images(size=3))
    assert caught[0].filename == __file__
    assert "only 2 values per group" in details(report, "1")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bl.convert(model, "gn", example=images(size=5))
        bl.convert(model, "gn", example=None)
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1))
    with pytest.raises(
        ValueError, match=r"^1: 1 groups of an input with 1 channels and 1 positions hold one value each"
    ) as e:
        bl.convert(model, "gn", example=images(size=3))
    sole_error(str(e.value))


def test_a_fan_in_of_one_is_skipped_where_centring_would_destroy_the_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3)
    )
    for weight in ("ws", "sws", "cwn"):
        converted, report = bl.convert(model, f"gn+{weight}", example=images())
        assert type(converted[0]) is nn.Conv2d
        assert isinstance(converted[2], bnn.WSConv2d | bnn.ScaledWSConv2d | bnn.CWNConv2d)
        assert details(report, "0") == ["fan-in of 1: standardizing would set its weight to 0"]
    assert type(bl.convert(model, "gn+wn")[0][0]) is bnn.WNConv2d


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_convolutions_are_left_alone_and_reported(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8))
    for name in ("gn+ws", "none+sws"):
        converted, report = bl.convert(model, name, example=images())
        assert details(report, "0") == ["its weight is computed by a parametrization or a hook"]
        assert report.entries[0].action == "skipped"
        converted(images()).sum().backward()
        assert all(p.grad is not None for p in converted.parameters())
        assert type(converted[0]) is type(model[0])


def test_a_parametrized_bias_is_left_alone_too():
    class Softplus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    parametrize.register_parametrization(model[0], "bias", Softplus())
    converted, report = bl.convert(model, "gn+ws", example=images())
    assert [entry.action for entry in report.entries] == ["skipped", "replaced"]
    assert torch.equal(converted[0].bias, model[0].bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_convolutions_with_a_weight_computed_by_a_hook_are_left_alone_and_reported(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8))
    model(images())  # from now on the layer keeps a computed tensor, which plain copying refuses
    converted, report = bl.convert(model, "gn+ws", example=images())
    assert details(report, "0") == ["its weight is computed by a parametrization or a hook"]
    converted(images()).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


def test_tensors_that_a_forward_left_on_a_module_do_not_hinder():
    class Keeps(Network):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            classes, maps = super().forward(x)
            self.last, self.pyramid = maps, [{"twice": 2 * maps}]
            return classes, maps

    model = Keeps()
    model(images())  # plain copying refuses tensors of a graph
    converted, _ = bl.convert(model, "gn+ws", example=images())
    assert torch.equal(converted.pyramid[0]["twice"], 2 * model.last)
    assert not converted.last.requires_grad


def test_layers_without_a_size_yet_are_an_error():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    for name in ("gn+ws", "none"):
        with pytest.raises(
            ValueError, match=r"^Sequential has layers whose size is not known yet \(first: 0\.weight\): run it once"
        ):
            bl.convert(model, name, example=images())
    model(images())
    assert len(bl.convert(model, "gn+ws", example=images())[1].replaced) == 2


def test_hooks_stay_on_replaced_layers():
    called = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), timm.layers.BatchNormAct2d(8))
    for index, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda m, inputs, i=index: called.append(f"before {i}"))
        layer.register_forward_hook(
            lambda m, inputs, keywords, y, i=index: called.append(f"after {i}"), with_kwargs=True
        )
        layer.register_full_backward_hook(lambda m, gi, go, i=index: called.append(f"backward {i}"))
    for name in ("gn+ws", "none+ws", "bcn-micro"):
        converted, _ = bl.convert(model, name)
        called.clear()
        converted(images().requires_grad_()).sum().backward()
        assert called == [f"{when} {i}" for i in range(3) for when in ("before", "after")] + [
            f"backward {i}" for i in (2, 1, 0)
        ]


def test_marks_of_the_user_stay_on_replaced_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[0].mark, model[1].mark = "first", ["second"]
    converted, _ = bl.convert(model, "bcn-micro+ws")
    assert (converted[0].mark, converted[1].mark) == ("first", ["second"])


def test_state_that_is_no_parameter_is_kept():
    model = Network()
    model.steps, model.history = 7, [1.0, 2.0]
    model.block.register_buffer("table", torch.arange(5))
    model.block.register_buffer("cache", torch.ones(2), persistent=False)
    model.block.scale = nn.Parameter(torch.full((3,), 2.0))
    converted, _ = bl.convert(model, "gn+ws", example=images())
    assert (converted.steps, converted.history) == (7, [1.0, 2.0])
    assert converted.history is not model.history
    for name in ("table", "cache", "scale"):
        assert torch.equal(getattr(converted.block, name), getattr(model.block, name))
    assert "block.table" in converted.state_dict()
    assert "block.cache" not in converted.state_dict()


def test_a_model_that_is_one_layer():
    converted, report = bl.convert(nn.Conv2d(3, 8, 3), "gn+ws")
    assert type(converted) is nn.Conv2d
    assert "(model)" in str(report)
    converted, _ = bl.convert(nn.BatchNorm2d(8), "gn", example=torch.randn(2, 8, 4, 4))
    assert type(converted) is nn.GroupNorm
    assert type(bl.convert(timm.layers.BatchNormAct2d(8), "gn")[0].norm) is nn.GroupNorm


def test_tied_parameters_stay_tied():
    model = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)) * 1, nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
    )
    model[2].weight = model[0].weight
    for name in ("gn+ws", "none+sws", "bcn-micro+wn"):
        converted, _ = bl.convert(model, name)
        assert converted[0].weight is converted[2].weight
        assert converted[0] is not converted[2]


def test_a_layer_that_stands_in_several_places_is_replaced_by_one():
    conv, norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    model = nn.Sequential(conv, norm, nn.ReLU(), conv, norm)
    for example in (torch.randn(2, 8, 6, 6), None):
        converted, report = bl.convert(model, "gn+ws", example=example)
        assert type(converted[0]) is bnn.WSConv2d
        assert converted[0] is converted[3]
        assert converted[1] is converted[4]
        assert len(report.replaced) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["gn+ws", "none+sws(gain=true)", "bcn-micro+cwn", "bcn+wn", "ln", "in", "frozen-bn", "sync-bn"]
)
def test_the_model_keeps_its_precision(name, dtype):
    model = Network().to(dtype)
    converted, _ = bl.convert(model, name, example=images().to(dtype))
    tensors = [*converted.parameters(), *converted.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    classes, maps = converted(images().to(dtype))
    assert classes.dtype == maps.dtype == dtype
    assert classes.isfinite().all()


@pytest.mark.parametrize(
    "name", ["gn+ws", "none+sws(gain=true)", "bcn-micro+cwn", "bcn-micro", "frozen-bn", "sync-bn", "ln", "in"]
)
def test_a_model_without_data_stays_without(name):
    with torch.device("meta"):
        model = nn.Sequential(Network(), nn.Identity())
        example = torch.randn(2, 3, 10, 10)
    for given in (example, None):
        converted, report = bl.convert(model, name, example=given)
        assert all(tensor.is_meta for tensor in (*converted.parameters(), *converted.buffers()))
        assert len(report.replaced) >= len(NORMS)


@pytest.mark.parametrize("name", ["gn+ws", "none+sws(gain=true)", "bcn-micro+cwn", "bcn+wn", "ln", "in", "sync-bn"])
def test_frozen_stays_frozen_and_trained_stays_trained(name):
    model = Network()
    nn.init.zeros_(model.block.bn2.weight)
    model.block.requires_grad_(False)
    converted, _ = bl.convert(model, name, example=images())
    frozen = {key for key, p in converted.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, _ in converted.named_parameters() if key.startswith("block.")}


def test_a_trained_layer_beside_a_frozen_one_stays_trained():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    model[0].requires_grad_(False)
    converted, _ = bl.convert(model, "none+sws")
    assert converted[0].bias.requires_grad  # it is the normalization's
    assert not converted[0].weight.requires_grad


def test_each_parameter_of_an_affine_map_stays_frozen_or_trained():
    for norm in (nn.BatchNorm2d(8), timm.layers.BatchNormAct2d(8)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm)
        model[1].weight.requires_grad_(False)
        for name in ("gn+ws", "ln", "in", "bcn-micro", "sync-bn"):
            converted, _ = bl.convert(model, name)
            holder = getattr(converted[1], "norm", converted[1])
            holder = getattr(holder, "batch_norm", holder)
            assert not holder.weight.requires_grad
            assert holder.bias.requires_grad
        assert bl.convert(model, "none")[0][0].bias.requires_grad


def test_modes_of_submodules_are_kept():
    model = nn.Sequential(Network(), timm.layers.BatchNormAct2d(5)).train()
    model[0].stem.eval()
    model[0].block.bn1.eval()
    model[1].act.eval()
    for name in ("gn+ws", "bcn-micro", "none"):
        converted, _ = bl.convert(model, name)
        before = {key: m.training for key, m in model.named_modules()}
        after = {key: m.training for key, m in converted.named_modules()}
        assert {key: mode for key, mode in after.items() if key in before} == before
        assert after["1.norm"]
        assert name != "bcn-micro" or not after["0.block.bn1.batch_norm"]


def test_layers_may_be_called_by_keyword():
    converted, report = bl.convert(CallsByKeyword(), "gn+ws", example=images())
    assert len(report.replaced) == 2
    converted(images())


class TrainingHead(nn.Module):
    """A head that runs only in training, where an example in evaluation mode does not get."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(self.bn(self.conv(x)))
        return (y, self.head(y)) if self.training else (y,)


def test_what_the_example_does_not_reach_is_found_by_structure():
    converted, _ = bl.convert(TrainingHead(), "none+sws", example=images())
    assert kinds(converted, {"conv", "head.0"}) == {bnn.ScaledWSConv2d}
    assert converted.head[0].bias is not None
    assert type(converted.head[3]) is nn.Conv2d
    assert conversion_of(converted).pairs == {"conv": "bn", "head.0": "head.1"}


def test_examples_are_a_tensor_or_a_tuple_of_arguments():
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: list[Tensor], scale: float) -> Tensor:
            return self.bn(self.conv(scale * x[0]))

    assert len(bl.convert(TwoInputs(), "gn+ws", example=([images()], 2.0))[1].replaced) == 2
    attached = images().requires_grad_() * 2  # a part of a graph, which plain copying refuses
    assert len(bl.convert(Network(), "gn+ws", example=attached)[1].replaced) == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gm", r"unknown normalization 'gm' in 'gm' \(did you mean '\w+'\?\): expected one of bn, frozen-bn"),
        ("bcn-mirco+ws", r"\(did you mean 'bcn-micro'\?\)"),
        ("gn+wss", r"unknown weight reparameterization 'wss' in 'gn\+wss' \(did you mean 'ws'\?\)"),
        ("gn(group=8)", r"gn has no setting 'group=8' \(did you mean 'groups'\?\): it takes groups"),
        ("gn+ws+ws", r"cannot read the normalizer 'gn\+ws\+ws'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message) as error:
        bl.convert(Network(), name)
    sole_error(str(error.value))


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (nn.Linear(3, 3), "gn", r"^nothing to convert to gn: Linear has no convolution and no batch normalization"),
        (nn.Linear(3, 3), "gn+ws", r"^nothing to convert to gn\+ws: Linear has no convolution"),
        (
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            "gn+ws",
            r"no convolution to reparameterize; pass the network",
        ),
    ],
)
def test_a_model_with_nothing_to_convert_is_an_error(model, name, message):
    with pytest.raises(ValueError, match=message) as error:
        bl.convert(model, name)
    sole_error(str(error.value))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (torch.randn(2, 4, 10, 10), "RuntimeError"),
        ((images(), images()), "TypeError"),
        ("images", "TypeError"),
    ],
)
def test_an_example_that_does_not_run_is_an_error(example, reason):
    with pytest.raises(
        ValueError, match=rf"^the model does not run on the example \({reason}: .*\): pass what its forward"
    ) as e:
        bl.convert(Network(), "gn+ws", example=example)
    sole_error(str(e.value))


def test_an_error_of_several_lines_in_the_model_is_told_in_one():
    class Fails(Network):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("first line\n  second line")

    with pytest.raises(ValueError, match="RuntimeError: first line second line") as error:
        bl.convert(Fails(), "gn", example=images())
    sole_error(str(error.value))
