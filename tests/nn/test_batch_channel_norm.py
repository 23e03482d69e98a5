"""Batch-channel normalization in both statistics modes, and channel normalization with its per-group affine map."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchless.nn as bnn
import reference
from batchless.nn import channel_norm
from layers_table import scrambled

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, int]:
    """[N, C, ..] and a group count that leaves eight values per group or more, so that nothing warns."""
    groups, rank = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    space = draw(st.tuples(*[st.integers(1, 4)] * rank))
    per_group = draw(st.integers(1, 4))
    while per_group * torch.Size(space).numel() < 8:
        per_group += 1
    shape = (draw(st.integers(2, 3)), groups * per_group, *space)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return draw(st.sampled_from([0.1, 3.0])) * torch.randn(shape, generator=generator, dtype=torch.float64) + 1, groups


def group_affine(groups: int) -> tuple[Tensor, Tensor]:
    return torch.randn(groups, dtype=torch.float64), torch.randn(groups, dtype=torch.float64)


def assert_same_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    functional = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * functional).sum(), leaves),
        torch.autograd.grad((theirs * functional).sum(), leaves),
        strict=True,
    ):
        # eps 1e-5 and small deviations: a condition number of 1e3 over float64 rounding.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(1 + b.abs().max()))


@given(inputs(), st.sampled_from([1e-5, 1e-2]))
def test_channel_norm_equals_the_reference(case, eps):
    x, groups = case
    weight, bias = (value.requires_grad_() for value in group_affine(groups))
    x.requires_grad_()
    ours = channel_norm(x, groups, weight, bias, eps)
    theirs = reference.channel_norm(x, groups, weight, bias, eps)
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert_same_gradients(ours, theirs, [x, weight, bias])


@given(inputs())
def test_group_norm_equals_the_reference(case):
    """The reference's group normalization, which other rooms test with, is torch's."""
    x, groups = case
    layer = scrambled(nn.GroupNorm(groups, x.shape[1]).double())
    torch.testing.assert_close(layer(x), reference.group_norm(x, groups, layer.weight, layer.bias), **EXACT)


@given(inputs())
def test_channel_norm_is_group_norm_with_one_gain_and_bias_per_group(case):
    x, groups = case
    torch.testing.assert_close(channel_norm(x, groups, None, None), F.group_norm(x, groups), **EXACT)
    weight, bias = group_affine(groups)
    repeat = x.shape[1] // groups
    per_channel = [torch.repeat_interleave(value, repeat) for value in (weight, bias)]
    torch.testing.assert_close(channel_norm(x, groups, weight, bias), F.group_norm(x, groups, *per_channel), **EXACT)


@given(inputs(), st.floats(0.5, 20.0), st.floats(-5.0, 5.0))
def test_channel_norm_is_invariant_to_an_affine_map_of_the_sample(case, a, b):
    x, groups = case
    expected = channel_norm(x, groups, None, None, eps=1e-30)
    torch.testing.assert_close(channel_norm(a * x + b, groups, None, None, eps=1e-30), expected, rtol=1e-8, atol=1e-8)


def affine_of(layer: bnn.BatchChannelNorm) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (layer.batch_norm.weight, layer.batch_norm.bias), (layer.weight, layer.bias)


@given(inputs(), st.sampled_from([1e-5, 1e-2]))
def test_large_batch_equals_the_reference(case, eps):
    x, groups = case
    layer = scrambled(bnn.BatchChannelNorm(x.shape[1], groups, statistics="batch", eps=eps).double())
    x.requires_grad_()
    ours, theirs = layer(x), reference.large_batch_bcn(x, *affine_of(layer), eps)
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert_same_gradients(ours, theirs, [x, *layer.parameters()])


@given(inputs(), st.sampled_from([1e-5, 1e-2]), st.booleans())
def test_micro_batch_equals_the_reference(case, eps, warmup):
    x, groups = case
    layer = scrambled(bnn.BatchChannelNorm(x.shape[1], groups, eps=eps, memory=9.0, warmup=warmup).double())
    estimates = layer.batch_norm.running_mean.clone(), layer.batch_norm.running_var.clone()
    for move, scale in enumerate((1.0, 2.0, 0.5), start=1):
        image = (scale * x).requires_grad_()
        rate = reference.move_rate(len(x), 9.0, move=move if warmup else None)
        theirs, estimates = reference.micro_batch_bcn(image, estimates, *affine_of(layer), rate=rate, eps=eps)
        ours = layer(image)
        torch.testing.assert_close(ours, theirs, **EXACT)
        assert_same_gradients(ours, theirs, [image, *layer.parameters()])
    torch.testing.assert_close(layer.batch_norm.running_mean, estimates[0], **EXACT)
    torch.testing.assert_close(layer.batch_norm.running_var, estimates[1], **EXACT)
    normalized = reference.normalize_by(x, *estimates, *affine_of(layer)[0], eps)
    torch.testing.assert_close(layer.eval()(x), reference.channel_norm(normalized, groups, *affine_of(layer)[1], eps))


def authors_channel_norm(y: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As the authors compute it: batch normalization of the (1, N * G, -1) view, then (1, G, 1) affine parameters."""
    samples = y.shape[0]
    z = F.batch_norm(y.reshape(1, samples * groups, -1), None, None, training=True, momentum=0.0, eps=eps)
    z = weight.view(1, groups, 1) * z.view(samples, groups, -1) + bias.view(1, groups, 1)
    return z.view_as(y)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_large_batch_equals_the_authors_composition_with_running_statistics(groups):
    layer = scrambled(bnn.BatchChannelNorm(16, groups, statistics="batch").double())
    inner = nn.BatchNorm2d(16).double()
    inner.load_state_dict(layer.batch_norm.state_dict())
    for scale in (1.0, 3.0):
        x = (scale * torch.randn(4, 16, 5, 5, dtype=torch.float64) + 1).requires_grad_()
        ours, theirs = layer(x), authors_channel_norm(inner(x), groups, layer.weight, layer.bias, 1e-5)
        torch.testing.assert_close(ours, theirs, **EXACT)
        assert_same_gradients(ours, theirs, [x, layer.weight, layer.bias])
    for name, value in inner.state_dict().items():
        torch.testing.assert_close(layer.batch_norm.state_dict()[name], value, **EXACT)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    expected = authors_channel_norm(inner.eval()(x), groups, layer.weight, layer.bias, 1e-5)
    torch.testing.assert_close(layer.eval()(x), expected, **EXACT)


@pytest.mark.parametrize("statistics", ["estimate", "batch"])
def test_the_groups_are_of_neighbouring_channels_where_32_does_not_divide(statistics):
    """The authors' view with 32 groups mixes channels at C = 48; here G is 24, and groups do not mix."""
    layer = bnn.BatchChannelNorm(48, statistics=statistics, eps=1e-12).double().eval()
    assert layer.num_groups == 24
    y = layer(torch.randn(2, 48, 6, 6, dtype=torch.float64)).detach()
    per_group = y.reshape(2, 24, -1)
    torch.testing.assert_close(per_group.mean(2), torch.zeros(2, 24, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(per_group.var(2, correction=0), torch.ones(2, 24, dtype=torch.float64), **EXACT)


def test_parameters_are_two_per_channel_and_two_per_group():
    layer = bnn.BatchChannelNorm(64)
    assert layer.weight.shape == layer.bias.shape == (32,)
    assert layer.batch_norm.weight.shape == layer.batch_norm.bias.shape == (64,)
    assert not list(bnn.BatchChannelNorm(64, affine=False).parameters())
    x = torch.randn(2, 64, 4, 4)
    for statistics in ("estimate", "batch"):
        torch.testing.assert_close(
            bnn.BatchChannelNorm(64, affine=False, statistics=statistics)(x),
            bnn.BatchChannelNorm(64, statistics=statistics)(x),
        )


def test_settings_reach_the_inner_normalization():
    inner = bnn.BatchChannelNorm(8, memory=7.0, update="forward", warmup=False, eps=1e-3).batch_norm
    assert (inner.memory, inner.update, inner.warmup, inner.eps) == (7.0, "forward", False, 1e-3)
    inner = bnn.BatchChannelNorm(8, statistics="batch", momentum=0.3, sync=True, eps=1e-3).batch_norm
    assert (inner.momentum, inner.sync, inner.eps) == (0.3, True, 1e-3)


@pytest.mark.parametrize("statistics", ["estimate", "batch"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_value_per_group_is_an_error_with_its_fix(statistics, training):
    layer = bnn.BatchChannelNorm(32, 32, statistics=statistics).train(training)
    with pytest.raises(ValueError, match=r"32 groups has one value per group.*fewer groups.*groups=4"):
        layer(torch.randn(2, 32, 1, 1))


@pytest.mark.parametrize("channels", [4, 16, 32, 64, 512])
def test_the_fix_in_the_text_works(channels):
    with pytest.raises(ValueError, match="one value per group") as error:
        channel_norm(torch.randn(2, channels, 1, 1), channels, None, None)
    groups = int(str(error.value).rpartition("groups=")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if channels < 8 else "error")
        y = channel_norm(torch.randn(2, channels, 1, 1), groups, None, None)
    assert (y != 0).any()


@pytest.mark.parametrize(("shape", "groups"), [((1, 14, 1, 1), 2), ((1, 2, 1, 3), 1), ((3, 14), 2)])
def test_fewer_than_eight_values_per_group_warn(shape, groups):
    with pytest.warns(UserWarning, match="values per group"):
        channel_norm(torch.randn(shape), groups, None, None)


@pytest.mark.parametrize(("shape", "groups"), [((1, 16, 1, 1), 2), ((1, 2, 2, 4), 2)])
def test_eight_values_per_group_do_not_warn(shape, groups):
    channel_norm(torch.randn(shape), groups, None, None)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"num_groups=5 does not divide num_features=16.*8"):
        bnn.BatchChannelNorm(16, 5)
    with pytest.raises(ValueError, match="num_groups=0"):
        bnn.BatchChannelNorm(16, 0)
    with pytest.raises(ValueError, match="num_groups=5 does not divide the 16 channels"):
        channel_norm(torch.randn(1, 16, 4, 4), 5, None, None)


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="'estimate' or 'batch', got 'running'"):
        bnn.BatchChannelNorm(16, statistics="running")


def test_a_single_image_trains():
    layer = bnn.BatchChannelNorm(16)
    x = torch.randn(1, 16, 8, 8).requires_grad_()
    layer(x).square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_statistics_of_a_mean_ten_thousand_times_the_deviation():
    y = torch.randn(2, 16, 8, 8) + 1e4
    # The float32 mean near 1e4 is known to 5e-4 deviations.
    exact = channel_norm(y.double(), 4, None, None)
    torch.testing.assert_close(channel_norm(y, 4, None, None).double(), exact, rtol=0, atol=3e-3)
