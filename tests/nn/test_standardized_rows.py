"""Rows written into memory that is there, and pulled back over the gradient's own, are those of the equation."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import batchless.nn as bnn
import reference
from batchless.nn import standardized, standardized_rows
from batchless.nn.standardized_rows import RowStandardization, WrittenRows

LAYERS = {
    "ws": lambda: bnn.WSConv2d(4, 6, 3),
    "ws-authors-bcn": lambda: bnn.WSConv2d(4, 6, 3, preset="authors-bcn"),
    "sws": lambda: bnn.ScaledWSConv2d(4, 6, 3, gamma=1.7),
    "ws-grouped": lambda: bnn.WSConv2d(4, 6, 3, groups=2),
    "ws-linear": lambda: bnn.WSLinear(5, 7),
    "ws-3d": lambda: bnn.WSConv3d(2, 3, 2),
}
"""Layers whose rows are written at once."""

BY_THE_GRAPH = {
    "ws-authors": lambda: bnn.WSConv2d(4, 6, 3, preset="authors"),
    "sws-gain": lambda: bnn.ScaledWSConv2d(4, 6, 3, gain=True),
    "ws-transposed": lambda: bnn.WSConvTranspose2d(4, 6, 3),
    "wn": lambda: bnn.WNConv2d(4, 6, 3),
}


def uneven(*shape: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return mean + torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(2, 40),
    chunk_bytes=st.sampled_from([1, 200, 700, 2**20]),
    factor=st.sampled_from([1.0, 0.3]),
    mean=st.sampled_from([0.0, 5.0]),
    double=st.booleans(),
)
def test_written_rows_are_the_equations_however_they_are_cut(outputs, inputs, chunk_bytes, factor, mean, double):
    dtype = torch.float64 if double else torch.float32
    rows = uneven(outputs, inputs, mean=mean).to(dtype)
    gradient = uneven(outputs, inputs, seed=1).to(dtype)
    exact = rows.double().clone().requires_grad_()
    expected = factor * torch.stack([reference.timm_row(row, eps=1e-6) for row in exact])
    expected.backward(gradient.double())
    out = torch.full_like(rows, torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standardized_rows, "_CHUNK_BYTES", chunk_bytes)
        written = WrittenRows.write(RowStandardization(eps=1e-6, factor=factor), rows, out)
    written.pull_back(gradient)
    # Centring loses what the mean is above the deviation, which two close values make small.
    loss = float((rows.double().abs().max(1).values / (rows.double().std(1, correction=0) + 1e-3)).max())
    tolerance = (1e-12 if double else 1e-5) * (1 + loss)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    scale = float(exact.grad.abs().max()) + 1
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=0, atol=tolerance * scale * (1 + loss))


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_the_weight_takes_the_memory_of_that_of_w_hat(name):
    layer = LAYERS[name]()
    with standardized(layer):
        layer.shared_weight.square().sum().backward()
        address = layer.shared_weight.grad.data_ptr()
    assert layer.weight.grad.data_ptr() == address
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("name", [*LAYERS, *BY_THE_GRAPH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_ways_give_the_same_values_and_gradients(name, dtype):
    layer = (LAYERS | BY_THE_GRAPH)[name]().to(dtype)
    expected = layer.reparameterized_weight()
    expected.sin().sum().backward()
    (gradient,) = (layer.weight.grad,)
    layer.zero_grad()
    for times in (1, 2):  # the second time there is a gradient already
        with standardized(layer):
            torch.testing.assert_close(layer.shared_weight, expected, rtol=0, atol=0)
            layer.shared_weight.sin().sum().backward()
        tolerance = 20 * torch.finfo(dtype).eps * float(gradient.abs().max())
        torch.testing.assert_close(layer.weight.grad, times * gradient, rtol=0, atol=times * tolerance)


def test_a_row_of_equal_values_is_zero_with_a_finite_gradient():
    for name in ("ws", "sws"):
        layer = LAYERS[name]()
        nn.init.constant_(layer.weight, 0.37)
        with standardized(layer):
            assert not bool(layer.shared_weight.any())
            layer.shared_weight.sum().backward()
        assert bool(layer.weight.grad.isfinite().all())


def test_who_asks_to_see_the_gradient_of_the_weight_is_shown_it():
    layer, seen = LAYERS["ws"](), []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    with standardized(layer):
        layer.shared_weight.square().sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], layer.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ws", "sws", "ws-grouped"])
def test_channels_last_weights_are_standardized_too(name):
    layer = LAYERS[name]()
    plain = layer.reparameterized_weight().detach()
    layer = layer.to(memory_format=torch.channels_last)
    with standardized(layer):
        torch.testing.assert_close(layer.shared_weight, plain, rtol=1e-6, atol=1e-6)
        layer.shared_weight.square().sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


def test_what_is_alive_beside_the_weights_is_one_w_hat_and_one_gradient():
    """Bytes of all tensors at the end of the backward pass and after the block, in sizes of the convolution weights."""
    model = nn.Sequential(*(bnn.WSConv2d(64, 64, 3, padding=1, bias=False) for _ in range(6)))
    weights = [layer.weight for layer in model]
    with standardized(model):
        model(torch.randn(1, 64, 2, 2)).sum().backward()
        inside = distinct_bytes(
            [*weights, *(layer.shared_weight for layer in model), *(layer.shared_weight.grad for layer in model)]
        )
        gradients = {layer.shared_weight.grad.data_ptr() for layer in model}
    after = distinct_bytes(
        [*weights, *(weight.grad for weight in weights), *(layer.kept_weight._leaf for layer in model)]
    )
    size = distinct_bytes(weights)
    assert inside == 3 * size
    assert after == 3 * size
    assert {weight.grad.data_ptr() for weight in weights} == gradients, "so there was no further copy in between"


def distinct_bytes(tensors) -> int:
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
