"""Weight standardization against the slow reference, its identities, and the public implementations."""

import math

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchless.nn as bnn
import reference
from batchless.nn import PRESETS, standardize_weight
from batchless.nn.weight_matrix import fan_in, from_matrix, to_matrix

every_preset = pytest.mark.parametrize("preset", PRESETS)
# float64 rounding, times the at most 1e5 that the smallest divisor of a preset (sqrt(1e-10)) amplifies it by.
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, dict[str, int | bool]]:
    """A weight in torch's layout, and that layout: linear, convolutions of 1 to 3 dimensions, grouped, transposed."""
    groups = draw(st.integers(1, 3))
    dimensions = draw(st.integers(0, 3))
    transposed = dimensions > 0 and draw(st.booleans())
    outputs, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    if inputs * math.prod(kernel) == 1:
        inputs = 2
    shape = (inputs * groups, outputs, *kernel) if transposed else (outputs * groups, inputs, *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale, shift = draw(st.sampled_from([1e-2, 1.0, 30.0])), draw(st.sampled_from([0.0, 0.5]))
    weight = scale * (torch.randn(shape, generator=generator, dtype=torch.float64) + shift)
    return weight, {"transposed": transposed, "groups": groups if transposed else 1}


def rows(weight: Tensor, layout: dict[str, int | bool]) -> Tensor:
    return torch.stack(reference.output_rows(weight, **layout))


@given(weights(), st.sampled_from(list(PRESETS)))
def test_equals_the_reference(case, preset):
    weight, layout = case
    expected = reference.standardized_weight(weight, preset, **layout)
    torch.testing.assert_close(standardize_weight(weight, preset, **layout), expected, **EXACT)


@given(weights(), st.sampled_from(list(PRESETS)), st.sampled_from([1e-8, 1e-3, 2.0]))
def test_eps_replaces_the_presets(case, preset, eps):
    weight, layout = case
    expected = reference.standardized_weight(weight, preset, eps=eps, **layout)
    torch.testing.assert_close(standardize_weight(weight, preset, eps=eps, **layout), expected, **EXACT)


@given(weights(), st.sampled_from(list(PRESETS)))
def test_gradient_equals_the_references(case, preset):
    weight, layout = case
    weight.requires_grad_()
    functional = torch.randn_like(weight)
    ours, theirs = (
        torch.autograd.grad((w_hat * functional).sum(), weight)[0]
        for w_hat in (
            standardize_weight(weight, preset, **layout),
            reference.standardized_weight(weight, preset, **layout),
        )
    )
    # For I = 2 the gradient is 0 up to eps: what rounding leaves is relative to its factors, |g| / sigma.
    scale = float(functional.abs().max() / rows(weight.detach(), layout).std(1).min())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * scale)


@given(weights())
def test_the_matrix_of_a_weight_and_back(case):
    weight, layout = case
    matrix = to_matrix(weight, **layout)
    torch.testing.assert_close(matrix, rows(weight, layout), rtol=0, atol=0)
    assert matrix.shape[1] == fan_in(weight, **layout)
    torch.testing.assert_close(from_matrix(matrix, weight, **layout), weight, rtol=0, atol=0)


@given(weights())
def test_rows_have_mean_zero_and_variance_one(case):
    weight, layout = case
    standardized = rows(standardize_weight(weight, **layout), layout)
    variance = rows(weight, layout).var(1, correction=0)
    torch.testing.assert_close(standardized.mean(1), torch.zeros(len(standardized), dtype=torch.float64), **EXACT)
    torch.testing.assert_close(standardized.var(1, correction=0), variance / (variance + 1e-6), **EXACT)


@given(weights(), st.sampled_from(list(PRESETS)), st.floats(0.1, 10.0), st.floats(-2.0, 2.0))
def test_invariant_to_a_positive_affine_map_of_a_row(case, preset, a, b):
    weight, layout = case
    tiny = {"eps": 1e-30}  # the invariance is exact only without eps
    outputs = len(rows(weight, layout))
    factors = torch.linspace(0.5, 1.5, outputs, dtype=torch.float64)[:, None] * a
    shifts = torch.linspace(-1, 1, outputs, dtype=torch.float64)[:, None] * b
    moved = from_matrix(to_matrix(weight, **layout) * factors + shifts, weight, **layout)
    expected = standardize_weight(weight, preset, **tiny, **layout)
    # Rounding of W + b relative to the deviation of W, here at least 1e-3 or so.
    torch.testing.assert_close(standardize_weight(moved, preset, **tiny, **layout), expected, rtol=1e-8, atol=1e-8)


@given(weights(), st.sampled_from(list(PRESETS)))
def test_the_gradient_of_a_row_sums_to_zero_and_is_orthogonal_to_it(case, preset):
    weight, layout = case
    weight.requires_grad_()
    w_hat = standardize_weight(weight, preset, eps=1e-30, **layout)
    functional = torch.randn_like(w_hat)
    (gradient,) = torch.autograd.grad((w_hat * functional).sum(), weight)
    gradient, weight, functional = (rows(value.detach(), layout) for value in (gradient, weight, functional))
    # What rounding leaves is relative to the factors of the gradient, |g| / sigma: for I = 2 the gradient itself is 0.
    scale = functional.norm(dim=1) / weight.std(1)
    assert (gradient.sum(1).abs() <= 1e-12 * scale).all()
    assert ((gradient * weight).sum(1).abs() <= 1e-12 * scale * weight.norm(dim=1)).all()


@given(weights())
def test_gradient_formula_of_the_paper(case):
    """`grad_w' = (g - <w_hat, g> w_hat / I) / sigma`, then its mean is subtracted; exact with eps inside the root."""
    weight, layout = case
    weight.requires_grad_()
    w_hat = standardize_weight(weight, "paper", **layout)
    functional = torch.randn_like(w_hat)
    (gradient,) = torch.autograd.grad((w_hat * functional).sum(), weight)
    for w, w_hat_i, g, ours in zip(
        *(rows(value.detach(), layout) for value in (weight, w_hat, functional, gradient)), strict=True
    ):
        sigma = torch.sqrt(w.var(correction=0) + 1e-5)
        centred = (g - (w_hat_i @ g) * w_hat_i / len(w)) / sigma
        expected = centred - centred.mean()
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * float(g.norm() / sigma))


@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, "tensor"], ids=["unscaled", "scaled"])
def test_a_constant_filter_gives_zeros_and_finite_gradients(preset, dtype, scale):
    # Zeros next to the 1 of a healthy filter. Rounding of the mean, divided by the least divisor, is all that may be left.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for value in (0.0, 0.02, 0.1, 1 / 3):
        for kernel in (1, 3, 7):
            weight = torch.full((3, 5, kernel, kernel), value, dtype=dtype, requires_grad=True)
            factor = torch.full((3,), 0.7, dtype=dtype) if scale == "tensor" else scale
            w_hat = standardize_weight(weight, preset, scale=factor)
            w_hat.backward(torch.randn_like(w_hat))
            assert w_hat.abs().max() <= tolerance, f"filters of {value}, {kernel}x{kernel}"
            assert weight.grad.isfinite().all()


@every_preset
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_has_float32_statistics_and_one_rounding(preset, dtype):
    weight = (0.02 * torch.randn(8, 4, 3, 3) + 0.1).to(dtype)
    ours = standardize_weight(weight, preset)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, standardize_weight(weight.float(), preset).to(dtype), rtol=0, atol=0)
    constant = torch.full((2, 9), 0.1, dtype=dtype, requires_grad=True)
    standardize_weight(constant, preset).sum().backward()
    assert constant.grad.isfinite().all()


@every_preset
def test_float32_with_a_mean_of_a_thousand_deviations(preset):
    weight = torch.randn(8, 4, 3, 3) + 1e3
    expected = standardize_weight(weight.double(), preset).float()
    # The mean has a rounding of 1e3 * 2^-24 = 6e-5 deviations, the values W - mu another.
    torch.testing.assert_close(standardize_weight(weight, preset), expected, rtol=0, atol=3e-4)


@every_preset
def test_differentiable_twice(preset):
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: standardize_weight(w, preset), (weight,), fast_mode=True)


@every_preset
def test_a_batch_of_weights_by_vmap(preset):
    weights = torch.randn(4, 3, 2, 3, dtype=torch.float64)

    def cubes(weight: Tensor) -> Tensor:
        return (standardize_weight(weight, preset) ** 3).sum()

    for function in (cubes, torch.func.grad(cubes)):
        expected = torch.stack([function(weight) for weight in weights])
        torch.testing.assert_close(torch.func.vmap(function)(weights), expected, rtol=1e-12, atol=1e-12)


@every_preset
@pytest.mark.parametrize("layout", ["transposed view", "every second", "channels last", "expanded"])
def test_a_weight_of_any_strides(preset, layout):
    weight = {
        "transposed view": torch.randn(9, 4).double().t(),
        "every second": torch.randn(4, 18).double()[:, ::2],
        "channels last": torch.randn(4, 3, 3, 3).double().to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 9).double().expand(4, 9),
    }[layout].requires_grad_()
    dense = weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    functional = torch.randn_like(dense)
    results = [standardize_weight(w, preset) for w in (weight, dense)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad((y * functional).sum(), w)[0] for y, w in zip(results, (weight, dense), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (bnn.WSConv1d, (4, 4, 1)),
        (bnn.WSConv2d, (4, 4, 1)),
        (bnn.WSConv3d, (4, 4, 1)),
        (bnn.WSConvTranspose2d, (4, 4, 1)),
        (bnn.ScaledWSConv2d, (4, 4, 1)),
        (bnn.ScaledWSConvTranspose2d, (4, 4, 1)),
        (bnn.CWNConv2d, (4, 4, 1)),
    ],
)
def test_a_fan_in_of_one_is_refused(layer, arguments):
    with pytest.raises(ValueError, match=f"{layer.__name__}.*fan-in of 1"):
        layer(*arguments, groups=4)
    layer(*arguments, groups=2)


@pytest.mark.parametrize("layer", [bnn.WSLinear, bnn.ScaledWSLinear, bnn.CWNLinear])
def test_a_linear_layer_of_one_input_is_refused(layer):
    with pytest.raises(ValueError, match="fan-in of 1"):
        layer(1, 3)


@every_preset
def test_standardizing_a_fan_in_of_one_is_refused(preset):
    with pytest.raises(ValueError, match="fan-in is 1"):
        standardize_weight(torch.randn(4, 1, 1, 1), preset)
    with pytest.raises(ValueError, match="fan-in is 1"):
        standardize_weight(torch.randn(4, 2, 1, 1), preset, transposed=True, groups=4)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"'author'.*authors"):
        bnn.WSConv2d(3, 4, 3, preset="author")
    with pytest.raises(ValueError, match="unknown eps placement"):
        standardize_weight(torch.randn(2, 3), placement="around")
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eps must be above 0"):
            bnn.WSConv2d(3, 4, 3, eps=eps)


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    return {
        "dimensions": dimensions,
        "transposed": draw(st.booleans()),
        "channels": (groups * draw(st.integers(2, 3)), groups * draw(st.integers(1, 3))),
        "kernel_size": draw(st.integers(1, 3)),
        "options": {
            "stride": draw(st.integers(1, 3)),
            "padding": draw(st.integers(0, 2)),
            "dilation": draw(st.integers(1, 2)),
            "groups": groups,
            "bias": draw(st.booleans()),
        },
    }


@given(convolutions(), st.sampled_from(list(PRESETS)), st.integers(1, 2))
def test_a_layer_is_torchs_with_the_references_weight(case, preset, samples):
    name = f"Conv{'Transpose' if case['transposed'] else ''}{case['dimensions']}d"
    arguments = (*case["channels"], case["kernel_size"])
    layer = getattr(bnn, f"WS{name}")(*arguments, **case["options"], preset=preset).double()
    plain = getattr(nn, name)(*arguments, **case["options"]).double()
    plain.load_state_dict(layer.state_dict())
    layout = {"transposed": case["transposed"], "groups": case["options"]["groups"] if case["transposed"] else 1}
    plain.weight.data = reference.standardized_weight(layer.weight.detach(), preset, **layout)
    x = torch.randn(samples, case["channels"][0], *[7, 6, 5][: case["dimensions"]], dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_are_torchs(mode):
    layer = bnn.WSConv2d(3, 4, 3, padding=1, padding_mode=mode).double()
    plain = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode).double()
    plain.load_state_dict({"weight": standardize_weight(layer.weight), "bias": layer.bias})
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


def test_a_sample_without_batch_dimension_and_an_output_size():
    x = torch.randn(2, 4, 5, 5)
    layer = bnn.WSConv2d(4, 4, 3)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    transposed = bnn.WSConvTranspose2d(4, 4, 3, stride=2)
    assert transposed(x, output_size=[12, 12]).shape == (2, 4, 12, 12)
    assert transposed(x).shape == (2, 4, 11, 11)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_equals_timms_std_conv(groups, eps):
    ours = bnn.WSConv2d(8, 12, 3, stride=2, padding=1, groups=groups, bias=True, eps=eps).double()
    theirs = timm.layers.StdConv2d(8, 12, 3, stride=2, groups=groups, bias=True, eps=eps).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [7, 8, 15])
@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(3, 2, 1), (7, 2, 1), (4, 3, 1), (3, 1, 2), (1, 2, 1)])
def test_same_padding_equals_timms(size, kernel_size, stride, dilation):
    options = {"stride": stride, "dilation": dilation}
    ours = bnn.WSConv2d(4, 6, kernel_size, **options, bias=False).double()
    ours.pad_input = bnn.SamePad(ours.kernel_size, ours.stride, ours.dilation)
    theirs = timm.layers.StdConv2dSame(4, 6, kernel_size, **options).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, size, size + 2, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert ours(x).shape[2:] == (-(size // -stride), -((size + 2) // -stride))


def test_standardization_is_invisible_after_a_normalization():
    """The reason for the method's freedom of scale: group normalization removes any factor of a channel."""
    weight, x = torch.randn(8, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    outputs = [
        F.group_norm(F.conv2d(x, standardize_weight(weight * factor, eps=1e-30)), 8, eps=1e-30)
        for factor in (1.0, 37.0)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
