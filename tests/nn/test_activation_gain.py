"""The gain of an activation: closed forms, a dense sum, and what it is for."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
from batchless.nn import activation_gain
from batchless.nn.activation_gain import PUBLISHED_RELU_GAIN

SMOOTH = {"silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh, "softplus": F.softplus, "mish": F.mish}
KINKED = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "leaky": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
}


def test_relu_has_a_closed_form():
    """E[relu] = 1 / sqrt(2 pi), E[relu^2] = 1/2, so that the variance is (1 - 1/pi) / 2."""
    assert activation_gain(torch.relu) == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-12)


def test_the_published_relu_gain_is_a_sampled_value_of_it():
    assert pytest.approx(1.7139588594436646, abs=0) == PUBLISHED_RELU_GAIN
    assert activation_gain(torch.relu) == pytest.approx(PUBLISHED_RELU_GAIN, rel=1e-3)


@pytest.mark.parametrize("slope", [0.01, 0.2, 1.0])
def test_leaky_relu_has_a_closed_form(slope):
    second_moment, mean = (1 + slope**2) / 2, (1 - slope) / math.sqrt(2 * math.pi)
    expected = 1 / math.sqrt(second_moment - mean**2)
    assert activation_gain(nn.LeakyReLU(slope)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED])
def test_equals_a_dense_sum(name):
    """A Riemann sum of 4 million points has an error of 1e-7 or so at a kink, far less elsewhere."""
    activation = (SMOOTH | KINKED)[name]
    assert activation_gain(activation) == pytest.approx(reference.activation_gain(activation), rel=1e-6)


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED])
def test_the_activated_signal_times_the_gain_has_variance_one(name):
    activation = (SMOOTH | KINKED)[name]
    y = activation_gain(activation) * activation(torch.randn(1_000_000))
    assert float(y.var()) == pytest.approx(1.0, abs=0.01)  # three deviations of a sampled variance, kurtosis 10


@given(st.floats(0.1, 10.0), st.floats(-3.0, 3.0))
def test_of_an_affine_map(a, b):
    assert activation_gain(lambda z: a * z + b) == pytest.approx(1 / a, rel=1e-9)


def test_modules_and_in_place_activations():
    assert activation_gain(nn.SiLU()) == activation_gain(F.silu)
    assert activation_gain(nn.ReLU(inplace=True)) == activation_gain(torch.relu)


def test_a_constant_or_infinite_activation_is_refused():
    for activation in (torch.zeros_like, lambda z: torch.full_like(z, 3.0), lambda z: z / 0, lambda z: torch.log(z)):
        with pytest.raises(ValueError, match="it has no gain"):
            activation_gain(activation)
