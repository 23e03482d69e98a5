"""Weight normalization and its centred form against the slow reference and torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import batchless.nn as bnn
import reference
from batchless.nn import normalize_weight

both = pytest.mark.parametrize("prefix", ["WN", "CWN"])


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, int | bool]]:
    dimensions, transposed, groups = draw(st.integers(0, 3)), draw(st.booleans()), draw(st.integers(1, 3))
    transposed = transposed and dimensions > 0
    outputs, inputs = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    shape = (inputs * groups, outputs, *kernel) if transposed else (outputs * groups, inputs, *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
    gain = torch.randn(outputs * groups, generator=generator, dtype=torch.float64)
    return weight, gain, {"transposed": transposed, "groups": groups if transposed else 1}


@given(weights(), st.booleans())
def test_equals_the_reference_with_its_gradients(case, centred):
    weight, gain, layout = case
    leaves = (weight.requires_grad_(), gain.requires_grad_())
    ours = normalize_weight(weight, gain, centred=centred, **layout)
    theirs = reference.normalized_weight(weight, gain, centred=centred, **layout)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    functional = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * functional).sum(), leaves),
        torch.autograd.grad((theirs * functional).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(1 + b.abs().max()))


@given(weights(), st.booleans(), st.floats(0.1, 10.0), st.floats(-2.0, 2.0))
def test_invariances_and_orthogonal_gradients(case, centred, a, b):
    weight, gain, layout = case
    shift = b if centred else 0.0
    options = {"centred": centred, **layout}
    expected = normalize_weight(weight, gain, **options)
    torch.testing.assert_close(normalize_weight(a * weight + shift, gain, **options), expected, rtol=1e-9, atol=1e-9)
    row_norms = torch.stack([row.norm() for row in reference.output_rows(expected, **layout)])
    torch.testing.assert_close(row_norms, gain.abs(), rtol=1e-10, atol=1e-12)
    weight.requires_grad_()
    w_hat = normalize_weight(weight, gain, **options)
    (gradient,) = torch.autograd.grad((w_hat * torch.randn_like(w_hat)).sum(), weight)
    pairs = zip(
        reference.output_rows(gradient, **layout), reference.output_rows(weight.detach(), **layout), strict=True
    )
    for g, w in pairs:
        length = (w - w.mean() if centred else w).norm()
        bound = 1e-11 * float(gain.abs().max() * len(w) * w.norm() / length)
        assert abs(float(g @ w)) <= bound * float(1 + w.norm())
        if centred:
            assert abs(float(g.sum())) <= bound * 10


# Not transposed with groups: torch normalizes dimension 1, which mixes the groups.
@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True)])
def test_equals_torchs_weight_norm(groups, transposed):
    name = "ConvTranspose2d" if transposed else "Conv2d"
    ours = getattr(bnn, f"WN{name}")(4, 6, 3, groups=groups).double()
    ours.gain.data = torch.randn_like(ours.gain)
    plain = getattr(nn, name)(4, 6, 3, groups=groups).double()
    theirs = parametrizations.weight_norm(plain, dim=1 if transposed else 0)
    original = theirs.parametrizations.weight
    original.original0.data = ours.gain.detach().view_as(original.original0)
    original.original1.data = ours.weight.detach()
    theirs.bias.data = ours.bias.detach()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.weight.grad, original.original1.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.gain.grad, original.original0.grad.flatten(), rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"])
def test_a_new_layer_starts_at_its_plain_weight(prefix, name):
    arguments = (4, 6) if name == "Linear" else (4, 6, 3)
    layer = getattr(bnn, prefix + name)(*arguments).double()
    layer.reset_gain()  # in float64
    weight = layer.weight.detach()
    if prefix == "CWN":
        rows = [row - row.mean() for row in reference.output_rows(weight, transposed="Transpose" in name)]
        weight = reference.from_output_rows(rows, weight.shape, transposed="Transpose" in name)
    torch.testing.assert_close(layer.effective_weight().detach(), weight, rtol=1e-12, atol=1e-12)


@both
def test_the_gain_follows_weights_loaded_later_only_when_asked(prefix):
    layer = getattr(bnn, f"{prefix}Conv2d")(3, 4, 3)
    before = layer.gain.detach().clone()
    layer.weight.data *= 3
    assert (layer.gain == before).all()
    layer.reset_gain()
    torch.testing.assert_close(layer.gain.detach(), 3 * before)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_row_gives_zeros_and_finite_gradients(prefix, dtype):
    weight = torch.zeros(3, 8, dtype=dtype, requires_grad=True)
    w_hat = normalize_weight(weight, torch.ones(3, dtype=dtype), centred=prefix == "CWN")
    w_hat.backward(torch.randn_like(w_hat))
    assert (w_hat == 0).all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_has_float32_norms_and_one_rounding(dtype):
    weight, gain = (100 * torch.randn(4, 900)).to(dtype), torch.randn(4).to(dtype)  # squares overflow fp16
    expected = normalize_weight(weight.float(), gain.float()).to(dtype)
    torch.testing.assert_close(normalize_weight(weight, gain), expected, rtol=0, atol=0)


def test_weight_normalization_of_a_fan_in_of_one_is_allowed():
    """Unlike centring, it destroys nothing: the weight becomes gain * sign."""
    layer = bnn.WNConv2d(4, 4, 1, groups=4)
    torch.testing.assert_close(layer.effective_weight(), layer.weight)
