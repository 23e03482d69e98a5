"""Folding gives torch's own layers with equal outputs, merges only what is certain, and refuses what it cannot keep."""

import copy
import itertools

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
from batchless.surgery import conversion_of

pytestmark = pytest.mark.filterwarnings("ignore:.*values per group:UserWarning")

ACTS = ("bn", "frozen-bn", "sync-bn", "gn", "ln", "in", "bcn", "bcn-micro", "none")


def images(samples: int = 3, channels: int = 3, size: int = 9, dimensions: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, channels, *(size,) * dimensions, generator=generator, dtype=torch.float64) + 0.3


def randomized(model: nn.Module) -> nn.Module:
    """`model` in float64 and evaluation mode, with no parameter, statistic or estimate left at 0 or 1."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in (*model.double().named_parameters(), *model.named_buffers()):
            if name.endswith(("moves", "memory", "tracked")):
                continue
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(0.5 + noise if name.endswith("running_var") else value + 0.6 * noise - 0.2)
    return model.eval()


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def count(model: nn.Module, *kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def folded_equal(model: nn.Module, *arguments: Tensor, example: object = None) -> nn.Module:
    """`fold(model)`, after checking that it computes the same and holds no layer of this package."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = bl.fold(model, example)
    with torch.no_grad():
        torch.testing.assert_close(folded(*arguments), model(*arguments), rtol=1e-10, atol=1e-10)
    assert not [kind for kind in kinds(folded) if kind.__module__.startswith("batchless")]
    assert not any(module.training for module in folded.modules())
    assert conversion_of(folded) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {id(p) for p in folded.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    return folded


class Block(nn.Module):
    """A residual block whose second gain starts at zero, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def network() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
    return nn.Sequential(stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("example", [images(), None], ids=["example", "structure"])
@pytest.mark.parametrize(
    "name", [*ACTS, *(f"{a}+{w}" for a, w in itertools.product(ACTS, ("ws", "sws(gain=true)", "wn", "cwn")))]
)
def test_a_folded_conversion_has_equal_outputs_and_none_of_our_layers(name, example):
    converted, _ = bl.convert(network().double(), name, example=example)
    folded = folded_equal(randomized(converted), images())
    act = name.partition("+")[0]
    if example is not None and act in ("bn", "frozen-bn", "sync-bn", "none"):
        assert count(folded, nn.modules.batchnorm._BatchNorm, nn.GroupNorm) == 0
    if example is not None and act in ("bcn", "bcn-micro"):
        assert (count(folded, nn.modules.batchnorm._BatchNorm), count(folded, nn.GroupNorm)) == (0, 4)


def test_a_plain_network_folds_with_an_example():
    model = randomized(network())
    assert count(folded_equal(model, images()), nn.BatchNorm2d) == 4  # nothing is certain of a model never converted
    folded = folded_equal(model, images(), example=images())
    assert count(folded, nn.BatchNorm2d) == 0
    assert count(folded, nn.Conv2d) == 4


def test_a_part_in_training_mode_is_refused_by_its_name():
    model = randomized(network()).train()
    with pytest.raises(
        ValueError, match=r"fold needs the model in evaluation mode, .* \(first: \(model\)\): call model\.eval\(\)"
    ):
        bl.fold(model)
    model.eval()
    model[1].bn2.train()
    with pytest.raises(ValueError, match=r"1 of its modules train \(first: 1\.bn2\)") as error:
        bl.fold(model)
    assert "\n" not in str(error.value)


class PreActivation(nn.Module):
    """Its order of declaration lies: each normalization runs before the convolution declared before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


@pytest.mark.parametrize("name", ["bn", "bn+ws", "bcn-micro", "bcn-micro+ws", "frozen-bn", "none+sws", "gn+ws"])
def test_guessed_pairs_are_not_merged(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation()).double()
    converted, _ = bl.convert(model, name)
    folded_equal(randomized(converted), images())
    converted, _ = bl.convert(model, name, example=images())
    folded = folded_equal(randomized(converted), images())
    assert count(folded, nn.BatchNorm2d) == (1 if name not in ("gn+ws", "none+sws") else 0)  # bn2 could be merged


def test_an_activation_that_stands_twice_is_between_twice():
    act = nn.ReLU()
    layers = (nn.Conv2d(3, 8, 3), act, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), act, nn.BatchNorm2d(8))
    for name in ("bn", "bcn-micro"):
        converted, _ = bl.convert(nn.Sequential(*layers).double(), name)
        folded_equal(randomized(converted), images())


class Twice(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * input


class Backwards(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for layer in reversed(self):
            input = layer(input)
        return input


@pytest.mark.parametrize(
    ("model", "merged"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), True),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.BatchNorm2d(8)), True),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())), True),
        (nn.Sequential(nn.Conv2d(3, 8, 3), Twice(), nn.BatchNorm2d(8)), False),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8)), False),
        (Backwards(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), False),
        (nn.Sequential(Backwards(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)), False),
    ],
)
def test_a_sequence_is_certain_where_it_runs_in_order(model, merged):
    converted, _ = bl.convert(copy.deepcopy(model).double(), "bn")
    folded = folded_equal(randomized(converted), images())
    assert (count(folded, nn.BatchNorm2d) == 0) == merged


def test_layers_used_more_than_once_are_not_merged():
    conv, norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    for model, x in (
        (nn.Sequential(conv, norm, conv), images(channels=8)),
        (nn.Sequential(conv, norm, nn.ReLU(), norm), images(channels=8)),
        (nn.Sequential(conv, norm, nn.ReLU(), conv, nn.BatchNorm2d(8)), images(channels=8)),
    ):
        model = randomized(copy.deepcopy(model))
        folded_equal(bl.convert(model, "bn")[0].eval(), x)
        folded_equal(model, x, example=x)
    # Used twice, but together each time: one convolution of the merged weight.
    model = randomized(nn.Sequential(conv, norm, nn.ReLU(), conv, norm))
    folded = folded_equal(model, images(channels=8), example=images(channels=8))
    assert count(folded, nn.BatchNorm2d) == 0


class Uses(nn.Module):
    """A convolution whose output its normalization is not the only one to see."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.conv, self.bn = use, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        match self.use:
            case "added":
                return (self.bn(y) + y,)
            case "returned":
                return self.bn(y), y
            case "in-place":
                y.mul_(2)
        return (self.bn(y),)


@pytest.mark.parametrize("use", ["added", "returned", "in-place"])
def test_a_convolution_whose_output_is_used_elsewhere_is_not_merged(use):
    model = randomized(Uses(use))
    folded = folded_equal(model, images(), example=images())
    assert count(folded, nn.BatchNorm2d) == 1
    assert count(folded_equal(randomized(Uses("")), images(), example=images()), nn.BatchNorm2d) == 0


class AbsoluteConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


@pytest.mark.parametrize(
    "conv",
    [
        AbsoluteConv(3, 8, 3),
        timm.layers.StdConv2d(3, 8, 3),
        timm.layers.ScaledStdConv2d(3, 8, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
        nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)),
    ],
    ids=["own forward", "StdConv2d", "ScaledStdConv2d", "weight_norm", "spectral_norm", "spectral_norm by a hook"],
)
def test_a_convolution_that_does_more_than_convolve_with_its_weight_is_not_merged(conv):
    model = nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(8)).double()
    randomized(model[1])
    folded = folded_equal(model.eval(), images(), example=images())
    assert count(folded, nn.BatchNorm2d) == 1
    converted, _ = bl.convert(model, "bcn-micro+ws", example=images())
    folded_equal(converted.eval(), images())


@pytest.mark.parametrize("name", ["bn", "bcn-micro+ws", "none+sws"])
@pytest.mark.parametrize("where", ["after the convolution", "before the normalization", "after the normalization"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
def test_hooks_keep_their_effect(name, where, norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8)).double()
    match where:
        case "after the convolution":
            model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
        case "before the normalization":
            model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
        case "after the normalization":
            model[1].register_forward_hook(lambda module, inputs, output: output - 3)
    for example in (images(), None):
        converted, _ = bl.convert(model, name, example=example)
        folded_equal(randomized(converted), images())


def test_a_hook_on_a_sequence_keeps_its_effect():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)).double()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    converted, _ = bl.convert(model, "bn")
    assert count(folded_equal(randomized(converted), images()), nn.BatchNorm2d) == 1


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("name", ["bn", "bcn-micro+ws", "none+sws"])
def test_same_padding_is_kept(name, size):
    model = nn.Sequential(timm.layers.Conv2dSame(3, 8, 3, stride=2), timm.layers.BatchNormAct2d(8)).double()
    converted, _ = bl.convert(model, name, example=images(size=size))
    folded = folded_equal(randomized(converted), images(size=size))
    assert count(folded, nn.BatchNorm2d) == 0
    assert type(folded[0]) is timm.layers.Conv2dSame


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes_are_kept(mode):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(8)).double()
    converted, _ = bl.convert(model, "bcn-micro+ws")
    folded = folded_equal(randomized(converted), images())
    assert folded[0].padding_mode == mode


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, timm.layers.BatchNormAct2d, timm.layers.FrozenBatchNormAct2d])
def test_the_libraries_normalizations_are_merged_as_they_are(norm):
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), norm(8)))
    folded = folded_equal(model, images(), example=images())
    assert count(folded, norm) == 0
    assert count(folded, nn.ReLU) == (norm is not FrozenBatchNorm2d)


def test_combined_layers_keep_activation_and_drop():
    norm = timm.layers.BatchNormAct2d(8)
    norm.act, norm.drop = nn.LeakyReLU(0.3), timm.layers.DropBlock2d()
    for name in ("bn", "bn+ws", "gn+ws", "bcn-micro+ws", "none+ws"):
        converted, _ = bl.convert(nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(norm)).double(), name)
        folded = folded_equal(randomized(converted), images())
        assert [m.negative_slope for m in folded.modules() if isinstance(m, nn.LeakyReLU)] == [0.3]
        assert count(folded, timm.layers.DropBlock2d) == 1


def test_a_linear_layer_is_merged_where_the_channel_is_the_last_dimension():
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    x = torch.randn(5, 4, dtype=torch.float64)
    assert count(folded_equal(model, x, example=x), nn.BatchNorm1d) == 0
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    x = torch.randn(5, 6, 4, dtype=torch.float64)  # here dimension 1 is the channel, and 6 like the outputs
    assert count(folded_equal(model, x, example=x), nn.BatchNorm1d) == 1


@given(
    dimensions=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    name=st.sampled_from(["bn", "frozen-bn", "bn+ws", "bcn-micro", "bcn+cwn", "bcn-micro+ws", "none+sws", "none+wn"]),
    zero_gain=st.booleans(),
)
def test_any_convolution_merges(dimensions, transposed, groups, kernel, stride, padding, bias, name, zero_gain):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    conv = kind(4, 6, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](6)
    if zero_gain:
        nn.init.zeros_(norm.weight)
    x = images(channels=4, size=5, dimensions=dimensions)
    converted, _ = bl.convert(nn.Sequential(conv, norm).double(), name, example=x)
    folded = folded_equal(randomized(converted), x)
    assert count(folded, nn.modules.batchnorm._BatchNorm) == 0
    assert type(folded[0]) is kind


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["bcn-micro", "bcn", "frozen-bn", "sync-bn", "none"])
def test_what_cannot_be_merged_becomes_a_batch_normalization_of_the_rank(name, dimensions):
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions](6)
    nn.init.zeros_(norm.weight)  # a scalar with `none`
    x = images(channels=6, size=5, dimensions=dimensions)
    for example in (x, None):
        converted, _ = bl.convert(nn.Sequential(nn.ReLU(), norm).double(), name, example=example)
        folded = folded_equal(randomized(converted), x)
        assert count(folded, nn.modules.batchnorm._BatchNorm) == 1


def test_without_running_statistics_a_batch_normalization_stays():
    norms = (nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8, affine=False))
    for norm, left in zip(norms, (1, 0), strict=True):
        model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
        assert count(folded_equal(model, images(), example=images()), nn.BatchNorm2d) == left


def test_a_single_layer_folds():
    for layer in (
        bnn.WSConv2d(3, 8, 3),
        bnn.WNConvTranspose2d(3, 8, 3),
        bnn.EstimatedBatchNorm(3),
        bnn.BatchChannelNorm(4),
    ):
        channels = 4 if isinstance(layer, bnn.BatchChannelNorm) else 3
        folded_equal(randomized(layer), images(channels=channels))
    layer = randomized(bnn.WSLinear(3, 8))
    assert type(folded_equal(layer, torch.randn(2, 3, dtype=torch.float64))) is nn.Linear


def test_half_precision_stays_half():
    converted, _ = bl.convert(network(), "bcn-micro+ws", example=images().float())
    model = randomized(converted).to(torch.bfloat16)
    folded = bl.fold(model)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    x = images().to(torch.bfloat16)
    torch.testing.assert_close(folded(x), model(x), rtol=0.1, atol=0.1)


def test_a_folded_model_needs_no_class_of_ours(tmp_path):
    converted, _ = bl.convert(network().double(), "bcn-micro+ws", example=images())
    folded = bl.fold(randomized(converted))
    torch.save(folded[0], tmp_path / "stem.pt")
    assert b"batchless" not in (tmp_path / "stem.pt").read_bytes()


def test_layers_taken_out_after_the_conversion_are_not_missed():
    converted, _ = bl.convert(nn.Sequential(network(), nn.Identity()).double(), "bcn-micro+ws", example=images())
    randomized(converted)
    converted[0][0] = nn.Sequential(nn.Identity(), converted[0][0][1], nn.Conv2d(8, 8, 1).double()).eval()
    converted[0][1].shortcut = nn.Identity().eval()
    folded_equal(converted, images(channels=8))


def test_an_example_adds_to_what_the_conversion_knows():
    converted, _ = bl.convert(network().double(), "none+sws")  # found by structure: only sequences are certain
    model = randomized(converted)
    without = count(folded_equal(model, images()), nn.BatchNorm2d)
    assert without == 1  # the scalar in place of bn2
    converted, _ = bl.convert(network().double(), "bcn-micro")
    model = randomized(converted)
    assert count(folded_equal(model, images()), nn.BatchNorm2d) == 2
    assert count(folded_equal(model, images(), example=images()), nn.BatchNorm2d) == 0
    converted, _ = bl.convert(network().double(), "none+sws", example=images())
    model = randomized(converted)
    assert count(folded_equal(model, images(), example=images()), nn.BatchNorm2d) == 0


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
def test_an_example_tells_the_rank(dimensions):
    x = images(channels=4, dimensions=dimensions)
    for norm in (bnn.EstimatedBatchNorm(4), bnn.BatchNorm(4), bnn.FrozenBatchNorm(4)):
        folded_equal(randomized(nn.Sequential(nn.ReLU(), norm)), x, example=x)
