"""What a conversion is asked for: names, which layers they mean, idempotence, errors."""

import copy
import itertools
import pickle

import pytest
import torch
from converted_network import (
    ACTS,
    ALONE,
    FOLLOWED,
    NORMS,
    WEIGHTS,
    DoubledConv,
    Network,
    ShiftedNorm,
    TrainingHead,
    by_example_and_structure,
    details,
    images,
    kinds,
    sole_error,
)
from torch import Tensor, nn

import batchless as bl
import batchless.nn as bnn
from batchless.surgery import conversion_of


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
