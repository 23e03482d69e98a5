"""Scaled weight standardization against the slow reference, timm, and what it is for: keeping the variance of a signal."""

import math

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchless.nn as bnn
import reference
from batchless.nn import PRESETS, activation_gain


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, dict[str, object]]:
    """A scaled layer with random weights, and the reference's options for it."""
    dimensions, transposed = draw(st.integers(0, 3)), draw(st.booleans())
    transposed = transposed and dimensions > 0
    groups = draw(st.integers(1, 2)) if dimensions else 1
    stride = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    own = {
        "gamma": draw(st.sampled_from([1.0, 1.7])),
        "gain": draw(st.booleans()),
        "preset": draw(st.sampled_from(list(PRESETS))),
    }
    channels = (groups * draw(st.integers(2, 3)), groups * draw(st.integers(1, 3)))
    if dimensions == 0:
        layer = bnn.ScaledWSLinear(*channels, **own, dtype=torch.float64)
    else:
        name = f"ScaledWSConv{'Transpose' if transposed else ''}{dimensions}d"
        kernel = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
        layer = getattr(bnn, name)(*channels, kernel, stride=stride, groups=groups, **own, dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
        if layer.gain is not None:
            layer.gain.copy_(torch.randn(layer.gain.shape, generator=generator, dtype=torch.float64))
    options = {"gamma": own["gamma"], "stride": stride, "transposed": transposed, "groups": groups if transposed else 1}
    return layer, options | {"preset": own["preset"], "gain": layer.gain}


def layout_of(options: dict[str, object]) -> dict[str, object]:
    return {"transposed": options["transposed"], "groups": options["groups"]}


@given(layers())
def test_equals_the_reference_with_its_gradients(case):
    layer, options = case
    ours, theirs = layer.effective_weight(), reference.scaled_standardized_weight(layer.weight, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    functional = torch.randn_like(ours)
    deviations = [row.detach().std() for row in reference.output_rows(layer.weight, **layout_of(options))]
    # For I = 2 the gradient is 0 up to eps: what rounding leaves is relative to its factors.
    scale = float(functional.abs().max() * ours.detach().abs().max() / min(deviations))
    learned = [layer.weight] if layer.gain is None else [layer.weight, layer.gain]
    for a, b in zip(
        torch.autograd.grad((ours * functional).sum(), learned),
        torch.autograd.grad((theirs * functional).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("gain", [False, True])
def test_the_norm_of_a_row_is_gamma_times_gain(gain):
    layer = bnn.ScaledWSConv2d(16, 8, 3, gamma=1.3, gain=gain, groups=2, eps=1e-30, dtype=torch.float64)
    if gain:
        layer.gain.data = torch.linspace(-1, 2, 8, dtype=torch.float64)
    expected = 1.3 * (layer.gain.detach().abs() if gain else torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(layer.effective_weight().detach().flatten(1).norm(dim=1), expected)


@pytest.mark.parametrize("gamma", [1.0, 1.7139588594436646])
@pytest.mark.parametrize("groups", [1, 4])
def test_equals_timms_scaled_std_conv(gamma, groups):
    ours = bnn.ScaledWSConv2d(8, 12, 3, stride=2, padding=1, groups=groups, gamma=gamma, gain=True).double()
    theirs = timm.layers.ScaledStdConv2d(8, 12, 3, stride=2, groups=groups, gamma=gamma).double()
    ours.gain.data = 0.5 + torch.rand_like(ours.gain)
    state = ours.state_dict()
    theirs.load_state_dict(state | {"gain": state["gain"].view(-1, 1, 1, 1)})
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.gain.grad, theirs.gain.grad.flatten(), rtol=1e-9, atol=1e-9)


def deepminds_weight(weight: Tensor, gain: Tensor) -> Tensor:
    """The fused form of nfnets/base.py, for [O, I] weights."""
    fan_in = weight.shape[1]
    mean, variance = weight.mean(1, keepdim=True), weight.var(1, correction=0, keepdim=True)
    scale = torch.rsqrt(torch.clamp(variance * fan_in, min=1e-4)) * gain[:, None]
    return weight * scale - mean * scale


@pytest.mark.parametrize("deviation", [1.0, 1e-1, 1e-3, 1e-6])
def test_the_nfnet_preset_equals_deepminds_code(deviation):
    layer = bnn.ScaledWSLinear(20, 6, gain=True, preset="nfnet", dtype=torch.float64)
    layer.weight.data = deviation * torch.randn(6, 20, dtype=torch.float64)
    layer.gain.data = torch.randn(6, dtype=torch.float64)
    expected = deepminds_weight(layer.weight, layer.gain)
    torch.testing.assert_close(layer.effective_weight(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", [torch.relu, torch.nn.functional.silu], ids=["relu", "silu"])
def test_variance_stays_through_activations_and_layers(activation):
    """What gamma is for: with it ten layers keep the variance of their input, without it ReLU loses it."""
    gamma = activation_gain(activation)
    variances = {}
    for factor in (gamma, 1.0):
        x = torch.randn(64, 512)
        for _ in range(10):
            # Standardized rows sum to 0, so that the activation's mean does not pass.
            x = bnn.ScaledWSLinear(512, 512, gamma=factor, bias=False)(activation(x)).detach()
        variances[factor] = float(x.var())
    assert 0.5 < variances[gamma] < 2.0  # a product of ten random factors around 1
    assert variances[1.0] < 0.1


@pytest.mark.parametrize("stride", [1, 2])
def test_a_transposed_convolution_keeps_the_variance_too(stride):
    layer = bnn.ScaledWSConvTranspose2d(64, 64, 4, stride=stride, bias=False)
    y = layer(torch.randn(8, 64, 16, 16))[..., 4:-4, 4:-4]
    assert float(y.detach().var()) == pytest.approx(1.0, rel=0.1)


def test_the_gain_is_learned_and_saved_only_where_asked_for():
    assert "gain" not in bnn.ScaledWSConv2d(3, 4, 3).state_dict()
    layer = bnn.ScaledWSConv2d(3, 4, 3, gain=True)
    assert (layer.state_dict()["gain"] == torch.ones(4)).all()
    layer(torch.randn(1, 3, 5, 5)).square().sum().backward()
    assert layer.gain.grad.abs().min() > 0


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_a_gamma_that_is_no_gain_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma must be positive and finite"):
        bnn.ScaledWSConv2d(3, 4, 3, gamma=gamma)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"'nfnets'.*nfnet"):
        bnn.ScaledWSConv2d(3, 4, 3, preset="nfnets")
