"""Generic suites over the table of all layers: numbers, dtypes, memory formats, and what can be done with a module."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import batchless.nn as bnn
from layers_table import LAYERS, Layer

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of a fixed random functional of it with respect to the input."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    functional = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * functional.to(y.dtype)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=False)


def is_abstract(layer: type[nn.Module]) -> bool:
    return any(getattr(getattr(layer, name), "__isabstractmethod__", False) for name in dir(layer))


def test_the_table_lists_every_public_layer():
    public = {
        value
        for name, value in vars(bnn).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_")
    }
    assert {layer.constructor for layer in LAYERS} == {layer for layer in public if not is_abstract(layer)}
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)


@every_layer
def test_no_layer_derives_from_torchs_batch_norm(layer: Layer):
    assert not issubclass(layer.constructor, nn.modules.batchnorm._NormBase)


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_the_numerical_ones(layer: Layer, training: bool):
    if training and layer.moves_estimates:
        training = False  # by definition no gradient flows through moving estimates: test_estimated_batch_norm.py
    module = layer.build(dtype=torch.float64).train(training)
    parameters = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True))
        state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, state, (x,))

    x = layer.input(dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters.values()), fast_mode=True)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_finite_and_near_float32(layer: Layer, dtype: torch.dtype):
    x = layer.input()
    expected, expected_gradient = run(layer.build(), x)
    module = layer.build()
    x = x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
    functional = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * functional.to(y.dtype)).sum().backward()
    assert y.dtype == (dtype if layer.kind == "weight" else torch.float32)
    # A handful of roundings of 2^-9 (bf16) or 2^-12 (fp16) each, relative to the largest value.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(x.grad, expected_gradient, rtol=0, atol=tolerance * scale)
    for name, gradient in gradients_of(module).items():
        assert gradient.isfinite().all(), name
        assert gradient.dtype == torch.float32, name


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_activations_keep_their_dtype(layer: Layer, dtype: torch.dtype):
    """What a layer receives inside autocast from a convolution before it, or in a model that is half precision whole."""
    x = layer.input()
    module = layer.build()
    if layer.kind != "norm":  # norms take half-precision inputs with float32 parameters, as torch's do
        module = module.to(dtype)
    expected, _ = run(layer.build(), x)
    y, gradient = run(module, x.to(dtype))
    assert y.dtype == dtype
    assert gradient.isfinite().all()
    tolerance = 16 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


@every_layer
def test_a_float64_layer_computes_in_float64(layer: Layer):
    module = layer.build(dtype=torch.float64)
    y, gradient = run(module, layer.input(dtype=torch.float64))
    assert y.dtype == gradient.dtype == torch.float64
    expected, _ = run(layer.build(), layer.input())
    # float32 against float64: both see the same numbers up to the rounding of the parameters.
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=3e-6 * float(y.abs().max()))


@pytest.mark.parametrize("layer", [la for la in LAYERS if len(la.input_shape) == 4], ids=lambda layer: layer.name)
def test_channels_last_gives_the_same_values(layer: Layer):
    x = layer.input(dtype=torch.float64)
    ours = layer.build(dtype=torch.float64)
    expected, expected_gradient = run(ours, x)
    module = layer.build(dtype=torch.float64).to(memory_format=torch.channels_last)
    y, gradient = run(module, x.to(memory_format=torch.channels_last))
    # The order of summation changes with the layout: 1e-12 is float64 rounding.
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    for name, value in gradients_of(ours).items():
        torch.testing.assert_close(gradients_of(module)[name], value, rtol=1e-12, atol=1e-12)
    if layer.plain is not None:
        plain = layer.build_plain(dtype=torch.float64).to(memory_format=torch.channels_last)
        theirs, _ = run(plain, x.to(memory_format=torch.channels_last))
        if theirs.is_contiguous(memory_format=torch.channels_last):
            assert y.is_contiguous(memory_format=torch.channels_last)


@every_layer
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_is_independent(layer: Layer, how):
    module = layer.build()
    run(module, layer.input())  # a used layer: gradients, estimates in motion
    module.zero_grad()
    twin = how(module)
    before = tensors_of(module)
    y, gradient = run(twin, layer.input())
    for name, value in tensors_of(module).items():
        same(value, before[name])
    expected, expected_gradient = run(module, layer.input())
    same(y, expected)
    same(gradient, expected_gradient)
    for name, value in tensors_of(module).items():
        same(tensors_of(twin)[name], value)


@every_layer
def test_state_dict_round_trip(layer: Layer):
    module = layer.build()
    run(module, layer.input())
    fresh = layer.constructor(*layer.arguments, **layer.torch_options, **layer.options)
    fresh.load_state_dict(module.state_dict())
    for training in (True, False):
        y, _ = run(fresh.train(training), layer.input())
        expected, _ = run(module.train(training), layer.input())
        same(y, expected)


@pytest.mark.parametrize("layer", [la for la in LAYERS if la.kind == "weight"], ids=lambda layer: layer.name)
def test_reparameterized_layers_have_the_plain_layers_keys(layer: Layer):
    ours, theirs = layer.build().state_dict(), layer.build_plain().state_dict()
    keys_of_gain = ["gain"] if "gain" in ours else []
    learns_gain = "WN" in layer.name or layer.options.get("gain", False)
    assert bool(keys_of_gain) == learns_gain
    assert list(ours) == [*theirs, *keys_of_gain]
    assert all(ours[key].shape == value.shape for key, value in theirs.items())


@every_layer
def test_a_layer_built_on_meta_is_filled_later(layer: Layer):
    module = layer.build()
    on_meta = layer.build(device="meta")
    assert all(value.is_meta for value in on_meta.state_dict().values())
    with torch.device("meta"):
        in_context = layer.build()
    for shell in (on_meta, in_context):
        filled = shell.to_empty(device="cpu")
        filled.load_state_dict(module.state_dict())
        expected, _ = run(copy.deepcopy(module), layer.input())
        y, _ = run(filled, layer.input())
        same(y, expected)


@every_layer
def test_factory_arguments(layer: Layer):
    for value in layer.build(dtype=torch.bfloat16).state_dict().values():
        assert value.dtype == torch.bfloat16 or not value.is_floating_point()


@every_layer
def test_three_forwards_before_backward_equal_three_backwards(layer: Layer):
    inputs = [layer.input(dtype=torch.float64) * factor + shift for factor, shift in ((1, 0), (0.5, 1), (2, -1))]
    together, apart = layer.build(dtype=torch.float64), layer.build(dtype=torch.float64)
    functionals = [torch.randn_like(together(x).detach()) for x in inputs]
    together = layer.build(dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = [together(x) for x in leaves]
    sum((y * f).sum() for y, f in zip(outputs, functionals, strict=True)).backward()
    for x, leaf, f in zip(inputs, leaves, functionals, strict=True):
        alone = x.clone().requires_grad_()
        (apart(alone) * f).sum().backward()
        torch.testing.assert_close(leaf.grad, alone.grad, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients_of(apart).items():
        torch.testing.assert_close(gradients_of(together)[name], gradient, rtol=1e-12, atol=1e-12)
    for name, value in tensors_of(apart).items():
        same(tensors_of(together)[name], value)


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_empty_batch_gives_an_empty_output_and_changes_nothing(layer: Layer, training: bool):
    module = layer.build().train(training)
    before = tensors_of(module)
    y, gradient = run(module, layer.input(samples=0))
    one = layer.build().eval()(layer.input(samples=1))
    assert y.shape == (0, *one.shape[1:])
    assert gradient.shape == layer.input(samples=0).shape
    for name, value in gradients_of(module).items():
        assert (value == 0).all(), name
    for name, value in tensors_of(module).items():
        same(value, before[name])


@every_layer
def test_a_batch_of_one_equals_its_sample_in_a_batch(layer: Layer):
    x = layer.input(dtype=torch.float64)
    for training in (True, False):
        if training and layer.kind == "norm" and layer.constructor is not bnn.FrozenBatchNorm:
            continue  # statistics of the batch: test_batch_norm.py, test_estimated_batch_norm.py
        module = layer.build(dtype=torch.float64).train(training)
        torch.testing.assert_close(module(x[:1]), module(x)[:1], rtol=1e-12, atol=1e-12)


@every_layer
def test_the_input_has_torchs_name(layer: Layer):
    """A model that calls `norm(input=x)` runs after conversion as before."""
    x = layer.input()
    same(layer.build()(input=x), layer.build()(x))


@pytest.mark.parametrize("layer", [la for la in LAYERS if la.kind == "norm"], ids=lambda layer: layer.name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_maps_of_one_by_one(layer: Layer, training: bool):
    x = layer.input()[:, :, :1, :1]
    module = layer.build().train(training)
    if layer.constructor is bnn.BatchChannelNorm:
        with pytest.warns(UserWarning, match="only 2 values per group"):
            y, gradient = run(module, x)
    else:
        y, gradient = run(module, x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert (y != 0).any()
    assert gradient.isfinite().all()


def test_skip_init_begins_as_nothing_and_learns():
    layer, x = bnn.SkipInit(), torch.randn(2, 3).requires_grad_()
    y = layer(x)
    assert (y == 0).all()
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(layer.gain.grad, x.detach().sum())
