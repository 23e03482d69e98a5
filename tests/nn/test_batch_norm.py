"""Batch normalization and its frozen form against torch, torchvision and the slow reference, on one process."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchless.nn as bnn
import reference
from layers_table import scrambled

TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@st.composite
def inputs(draw: st.DrawFn) -> Tensor:
    """[N, C, ..] with two values per channel or more."""
    rank = draw(st.integers(2, 5))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)), *draw(st.tuples(*[st.integers(1, 4)] * (rank - 2))))
    if torch.Size(shape).numel() == shape[1]:
        shape = (2, *shape[1:])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return draw(st.sampled_from([0.1, 3.0])) * torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def pair(x: Tensor, **options: object) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's with the same state, both float64."""
    ours = scrambled(bnn.BatchNorm(x.shape[1], **options).double())
    theirs = TORCHS[x.dim()](x.shape[1], **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_run(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Outputs, gradients of input and parameters, and state."""
    leaves, functional = [x.clone().requires_grad_() for _ in range(2)], torch.randn_like(x)
    outputs = [layer(leaf) for layer, leaf in zip((ours, theirs), leaves, strict=True)]
    for layer, y in zip((ours, theirs), outputs, strict=True):
        layer.zero_grad()
        (y * functional).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-9, atol=1e-9)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-11, atol=1e-11)


@given(inputs(), st.sampled_from([1e-5, 1e-2]), st.sampled_from([0.1, 1.0]), st.booleans())
def test_equals_torchs(x, eps, momentum, affine):
    ours, theirs = pair(x, eps=eps, momentum=momentum, affine=affine)
    for scale in (1.0, 2.0):
        assert_same_run(ours, theirs, scale * x)
    assert_same_run(ours.eval(), theirs.eval(), x)


@given(inputs(), st.sampled_from([1e-5, 1e-2]))
def test_equals_the_reference(x, eps):
    layer = scrambled(bnn.BatchNorm(x.shape[1], eps=eps, momentum=1.0).double())
    expected, mean, var = reference.batch_norm(x, layer.weight, layer.bias, eps)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    count = x.numel() // x.shape[1]
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_var, var * count / (count - 1), rtol=1e-11, atol=1e-11)


def test_output_has_mean_beta_and_deviation_gamma():
    layer = scrambled(bnn.BatchNorm(5, eps=1e-12).double())
    y = layer(3 * torch.randn(4, 5, 6, 7, dtype=torch.float64) + 10).detach()
    torch.testing.assert_close(y.mean((0, 2, 3)), layer.bias.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), layer.weight.detach().abs(), rtol=1e-9, atol=1e-9)


def test_statistics_of_a_mean_ten_thousand_times_the_deviation():
    x = torch.randn(4, 5, 8, 8) + 1e4
    layer, exact = bnn.BatchNorm(5, momentum=1.0), bnn.BatchNorm(5, momentum=1.0).double()
    y, expected = layer(x), exact(x.double())
    # Squares about the mean lose nothing; E[x^2] - E[x]^2 in float32 would be off by 1e8 * 2^-24 = 6 deviations.
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=0)
    # The mean is a float32 near 1e4, half a unit in its last place is 5e-4 deviations.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_inputs_have_float32_statistics(dtype):
    x = (30 * torch.randn(4, 5, 64, 64) + 300).to(dtype)  # sums and squares overflow fp16
    layer, exact = bnn.BatchNorm(5, momentum=1.0), bnn.BatchNorm(5, momentum=1.0).double()
    y, expected = layer(x), exact(x.double())
    assert y.dtype == dtype
    assert layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-4, atol=0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1), (1, 4, 1, 1, 1)])
def test_one_value_per_channel_is_refused_in_training_only(shape):
    layer = bnn.BatchNorm(4)
    with pytest.raises(ValueError, match=r"one value per channel.*more images per forward.*gn, bcn-micro"):
        layer(torch.randn(shape))
    assert layer.eval()(torch.randn(shape)).shape == shape


def test_reset():
    layer = bnn.BatchNorm(4)
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(2, 4, 3))
    assert layer.num_batches_tracked == 1
    layer.reset_running_stats()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, fresh[name])


def test_sync_without_processes_is_the_plain_layer():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    assert_same_run(scrambled(bnn.BatchNorm(4, sync=True).double()), pair(x)[1], x)


@given(inputs(), st.sampled_from([0.0, 1e-5, 1e-2]))
def test_the_frozen_form_equals_torchvisions(x, eps):
    ours = scrambled(bnn.FrozenBatchNorm(x.shape[1], eps=eps).double())
    theirs = torchvision.ops.FrozenBatchNorm2d(x.shape[1], eps=eps).double()
    theirs.load_state_dict(ours.state_dict())
    as_4d = x.reshape(*x.shape[:2], -1, 1)
    for training in (True, False):
        y = ours.train(training)(x)
        torch.testing.assert_close(y.reshape(as_4d.shape), theirs(as_4d), rtol=1e-10, atol=1e-10)


def test_the_frozen_form_learns_and_moves_nothing():
    layer = scrambled(bnn.FrozenBatchNorm(4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(2, 4, 3, 3).requires_grad_()
    layer.train()(x).sum().backward()
    assert not list(layer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    slope = layer.weight / torch.sqrt(layer.running_var + layer.eps)
    torch.testing.assert_close(x.grad, slope.view(1, -1, 1, 1).expand_as(x))


def test_torchvisions_checkpoint_of_a_frozen_layer_loads():
    theirs = scrambled(torchvision.ops.FrozenBatchNorm2d(4))
    ours = bnn.FrozenBatchNorm(4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(ours(x), theirs(x))
