"""Which kinds of layers are converted: subclasses, libraries' own, every dimension, parametrized ones."""

import warnings

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from converted_network import (
    DoubledConv,
    NamedConv,
    NamedNorm,
    OwnConvForward,
    ShiftedNorm,
    details,
    images,
    sole_error,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.ops import FrozenBatchNorm2d

import batchless as bl
import batchless.nn as bnn


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
