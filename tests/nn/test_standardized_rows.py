"""Rows standardized once for many passes, and the pullback of their gradient, are those of the equation."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import batchless.nn as bnn
import reference
from batchless.nn import standardized
from batchless.nn.standardized_rows import RowStandardization, StandardizedRows

LAYERS = {
    "ws": lambda: bnn.WSConv2d(4, 6, 3),
    "ws-authors-bcn": lambda: bnn.WSConv2d(4, 6, 3, preset="authors-bcn"),
    "sws": lambda: bnn.ScaledWSConv2d(4, 6, 3, gamma=1.7),
    "ws-grouped": lambda: bnn.WSConv2d(4, 6, 3, groups=2),
    "ws-linear": lambda: bnn.WSLinear(5, 7),
    "ws-one-by-one": lambda: bnn.WSConv2d(4, 6, 1),
    "ws-3d": lambda: bnn.WSConv3d(2, 3, 2),
}
"""Layers whose rows are standardized without a graph."""

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
    factor=st.sampled_from([1.0, 0.3]),
    mean=st.sampled_from([0.0, 5.0]),
    double=st.booleans(),
)
def test_rows_are_the_equations(outputs, inputs, factor, mean, double):
    dtype = torch.float64 if double else torch.float32
    rows = uneven(outputs, inputs, mean=mean).to(dtype)
    gradient = uneven(outputs, inputs, seed=1).to(dtype)
    exact = rows.double().clone().requires_grad_()
    expected = factor * torch.stack([reference.timm_row(row, eps=1e-6) for row in exact])
    expected.backward(gradient.double())
    values, found = StandardizedRows.of(RowStandardization(eps=1e-6, factor=factor), rows)
    pulled_back = found.pull_back(gradient)
    # Centring loses what the mean is above the deviation, which two close values make small.
    loss = float((rows.double().abs().max(1).values / (rows.double().std(1, correction=0) + 1e-3)).max())
    tolerance = (1e-12 if double else 1e-5) * (1 + loss)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    scale = float(exact.grad.abs().max()) + 1
    torch.testing.assert_close(pulled_back.double(), exact.grad, rtol=0, atol=tolerance * scale * (1 + loss))


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


@pytest.mark.parametrize("name", ["ws", "sws", "ws-grouped", "ws-one-by-one"])
def test_channels_last_weights_are_standardized_too(name):
    layer = LAYERS[name]()
    plain = layer.reparameterized_weight().detach()
    layer = layer.to(memory_format=torch.channels_last)
    with standardized(layer):
        torch.testing.assert_close(layer.shared_weight, plain, rtol=1e-6, atol=1e-6)
        layer.shared_weight.square().sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


def storage_of(tensor: torch.Tensor | None) -> StorageWeakRef:
    assert tensor is not None
    return StorageWeakRef(tensor.untyped_storage())


@pytest.mark.parametrize("name", LAYERS)
def test_w_hat_and_the_gradient_of_w_take_turns_in_memory(name, monkeypatch):
    """Each is freed before the other is made, and the last one stays: what is made next finds memory of its size."""
    layer, there = LAYERS[name](), []
    of, pull_back = StandardizedRows.of, StandardizedRows.pull_back

    def noted_of(rule, rows):
        there.append(last is not None and not last.expired())
        return of(rule, rows)

    def noted_pull_back(rows, gradient):
        there.append(not last.expired())
        return pull_back(rows, gradient)

    monkeypatch.setattr(StandardizedRows, "of", noted_of)
    monkeypatch.setattr(StandardizedRows, "pull_back", noted_pull_back)
    last: StorageWeakRef | None = None
    for _ in range(3):
        with standardized(layer):
            layer.shared_weight.square().sum().backward()
            last = storage_of(layer.shared_weight)
            gradient = storage_of(layer.shared_weight.grad)
        assert gradient.expired()
        last = storage_of(layer.weight.grad)
        layer.zero_grad()
        assert not last.expired(), "so its memory does not go back to the system"
    assert there == [False] * 6


def test_the_gradients_are_pulled_back_without_more_memory(monkeypatch):
    """Beside W there are never more than two of its size: W_hat or the gradient of W, and the gradient of W_hat."""
    model = nn.Sequential(*(bnn.WSConv2d(8, 8, 3, padding=1, bias=False) for _ in range(12)))
    weights: list[StorageWeakRef] = []
    most, pull_back = 0, StandardizedRows.pull_back

    def counted(rows, gradient):
        nonlocal most
        found = pull_back(rows, gradient)
        there = sum(not one.expired() for one in weights) + sum(layer.weight.grad is not None for layer in model)
        most = max(most, there + 1)  # and what was found
        return found

    monkeypatch.setattr(StandardizedRows, "pull_back", counted)
    with standardized(model):
        model(torch.randn(1, 8, 2, 2)).sum().backward()
        for layer in model:
            weights += [storage_of(layer.shared_weight), storage_of(layer.shared_weight.grad)]
    assert most == 2 * len(model)
