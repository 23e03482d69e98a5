"""Adaptive gradient clipping against a loop over units, and clipping by the joint norm."""

import copy

import pytest
import torch
from accumulate_worker import block_step, micro_batches, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batchless.nn import ScaledWSConv2d, ScaledWSConvTranspose2d, SkipInit, WSConv2d
from batchless.train import AGC, ClipNorm


class Tokens(nn.Module):
    """Parameters that belong to no layer of torch's."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(2, 5, 3))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.nothing = nn.Parameter(torch.empty(0, 3))


LAYERS = {
    "conv": lambda: nn.Conv2d(3, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise 1x1": lambda: nn.Conv2d(4, 4, 1, groups=4),
    "one output": lambda: nn.Conv2d(4, 1, 3),
    "conv1d": lambda: nn.Conv1d(3, 4, 3),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "transposed": lambda: nn.ConvTranspose2d(3, 5, 2),
    "grouped transposed": lambda: nn.ConvTranspose2d(6, 4, 2, groups=2),
    "depthwise transposed": lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
    "one output transposed": lambda: nn.ConvTranspose2d(3, 1, 2),
    "linear": lambda: nn.Linear(7, 4),
    "embedding": lambda: nn.Embedding(5, 4),
    "gain": lambda: nn.GroupNorm(2, 6),
    "standardized": lambda: WSConv2d(3, 6, 3),
    "scaled, with gain": lambda: ScaledWSConv2d(3, 6, 3, gain=True),
    "scaled transposed, with gain": lambda: ScaledWSConvTranspose2d(4, 6, 3, groups=2, gain=True),
    "scalar": SkipInit,
    "tokens": Tokens,
}


def units(module: nn.Module, parameter: Tensor) -> list[tuple]:
    """Indices of the parts of a parameter that are clipped apart, from the definition."""
    if sum(size > 1 for size in parameter.shape) <= 1:
        return [(...,)]
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return [(index,) for index in range(parameter.shape[0])]
    inputs = parameter.shape[0] // module.groups
    return [
        (slice(group * inputs, (group + 1) * inputs), output)
        for group in range(module.groups)
        for output in range(parameter.shape[1])
    ]


def slow_agc(model: nn.Module, clipping: float) -> int:
    """Clip every unit in a loop; how many were changed."""
    changed = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            for unit in units(module, parameter):
                weight, gradient = parameter.detach()[unit], parameter.grad[unit]
                bound = clipping * max(weight.square().sum().sqrt().item(), 1e-3)
                norm = gradient.square().sum().sqrt().item()
                if norm > bound:
                    parameter.grad[unit] = gradient * (bound / max(norm, 1e-6))
                    changed += 1
    return changed


def layer_with_gradients(name: str, *, scale: float, seed: int) -> nn.Module:
    """Units of very different weights and gradients: ordinary, below the floor, and zero."""
    torch.manual_seed(seed)
    layer = LAYERS[name]().double()
    for module in layer.modules():
        for parameter in module.parameters(recurse=False):
            parameter.grad = scale * torch.randn_like(parameter)
            for unit in units(module, parameter) if parameter.numel() else []:
                parameter.data[unit] *= [1.0, 1e-4, 0.0, 10.0][torch.randint(4, ()).item()]
                parameter.grad[unit] *= [1.0, 1e-3, 0.0, 30.0][torch.randint(4, ()).item()]
    return layer


def assert_same_gradients(layer: nn.Module, expected: nn.Module):
    for (name, actual), other in zip(layer.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, other.grad, rtol=1e-13, atol=0, msg=lambda text, name=name: name + text)


SCALES = st.sampled_from([1e-9, 1e-6, 1e-3, 0.1, 1.0, 100.0])


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(clipping=st.sampled_from([1e-5, 0.01, 0.1, 3.0]), scale=SCALES, seed=st.integers(0, 10_000))
def test_agc_equals_the_loop_over_units(name, clipping, scale, seed):
    layer = layer_with_gradients(name, scale=scale, seed=seed)
    expected, before = copy.deepcopy(layer), copy.deepcopy(layer)
    for parameter, original in zip(expected.parameters(), layer.parameters(), strict=True):
        parameter.grad = original.grad.clone()
    slow_agc(expected, clipping)
    AGC(clipping)(layer)
    assert_same_gradients(layer, expected)
    for parameter, original in zip(layer.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, original)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(clipping=st.sampled_from([0.01, 0.1]), scale=SCALES, seed=st.integers(0, 10_000))
def test_unit_norms_after_clipping_keep_their_bound_and_zero_stays_zero(name, clipping, scale, seed):
    layer = layer_with_gradients(name, scale=scale, seed=seed)
    zero = [parameter.grad == 0 for parameter in layer.parameters()]
    AGC(clipping)(layer)
    for parameter, was_zero in zip(layer.parameters(), zero, strict=True):
        assert parameter.grad.isfinite().all()
        assert (parameter.grad[was_zero] == 0).all()
    for module in layer.modules():
        for parameter in module.parameters(recurse=False):
            for unit in units(module, parameter):
                bound = clipping * max(parameter.detach()[unit].norm().item(), 1e-3)
                assert parameter.grad[unit].norm().item() <= bound * (1 + 1e-12)


def test_the_cases_do_clip_some_units_and_leave_others():
    for name in LAYERS:
        counts = []
        for seed in range(20):
            layer = layer_with_gradients(name, scale=1.0, seed=seed)
            counts.append(slow_agc(layer, 0.1))
        assert max(counts) > 0, name
        assert min(counts) < sum(len(units(m, p)) for m in layer.modules() for p in m.parameters(recurse=False)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_do_not_overflow(dtype):
    layer = nn.Linear(64, 2, bias=False).to(dtype)
    nn.init.constant_(layer.weight, 1e4)
    layer.weight.grad = torch.full_like(layer.weight, 3e4)
    AGC(0.1)(layer)
    torch.testing.assert_close(layer.weight.grad.float(), torch.full((2, 64), 1e3), rtol=1e-2, atol=0)


def test_a_parameter_without_gradient_is_passed_over():
    layer = nn.Linear(3, 2)
    layer.bias.grad = torch.full((2,), 100.0)
    AGC(0.1)(layer)
    assert layer.weight.grad is None
    assert layer.bias.grad.norm() < 1


def excluding_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    return model


@pytest.mark.parametrize(
    ("exclude", "names"),
    [
        (lambda module, name, parameter: isinstance(module, nn.Linear) and name == "2", ["2.weight", "2.bias"]),
        (lambda module, name, parameter: parameter == "bias", ["0.bias", "1.0.bias", "1.1.bias", "2.bias"]),
        (lambda module, name, parameter: isinstance(module, nn.GroupNorm), ["1.0.weight", "1.0.bias"]),
        (lambda module, name, parameter: False, []),
    ],
)
def test_excluded_parameters_are_listed_and_left_alone(exclude, names):
    model = excluding_model()
    clip = AGC(0.1, exclude=exclude)
    assert clip.excluded(model) == names
    clip(model)
    untouched = [name for name, parameter in model.named_parameters() if (parameter.grad == 100).all()]
    assert untouched == names


def test_names_of_a_layer_that_is_the_model_have_no_dot():
    assert AGC(0.1, exclude=lambda module, name, parameter: name == "").excluded(nn.Linear(2, 2)) == ["weight", "bias"]


def test_a_compiled_model_shows_the_same_names_to_exclude():
    model = excluding_model()
    compiled = torch.compile(model, backend="aot_eager")
    clip = AGC(0.1, exclude=lambda module, name, parameter: name == "2")
    assert clip.excluded(compiled) == ["2.weight", "2.bias"]
    clip(compiled)
    assert (model[2].weight.grad == 100).all()


def test_a_tied_parameter_that_is_listed_as_excluded_is_left_alone():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.grad = torch.full((4, 3), 100.0)
    for kind in (nn.Embedding, nn.Linear):
        clip = AGC(0.1, exclude=lambda module, name, parameter, kind=kind: isinstance(module, kind))
        assert len(clip.excluded(model)) == 1
        clip(model)
        assert (model[0].weight.grad == 100).all()


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clip_norm_equals_torch(max_norm):
    model, other = excluding_model(), excluding_model()
    ClipNorm(max_norm)(model)
    nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    assert_same_gradients(model, other)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm <= max_norm * (1 + 1e-5)


@pytest.mark.parametrize("clip", [AGC(1e-3), ClipNorm(1e-3)], ids=["AGC", "ClipNorm"])
@pytest.mark.parametrize("weight", ["ws", "sws", "wn", "cwn"])
def test_inside_a_step_raw_weights_and_mean_gradients_are_clipped(clip, weight):
    model, other = (network("none", weight) for _ in range(2))
    batches = micro_batches([(3, 3), (1, 1), (2, 2)], seed=0)
    block_step(model, torch.optim.SGD(model.parameters(), lr=10.0), batches, clip=clip)

    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    nn.functional.cross_entropy(other(images), targets).backward()
    start = copy.deepcopy(other.state_dict())
    if isinstance(clip, AGC):
        assert slow_agc(other, 1e-3) > 0
    else:
        nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
    torch.optim.SGD(other.parameters(), lr=10.0).step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=1e-12)
    assert not torch.equal(start["0.weight"], other.state_dict()["0.weight"])


@pytest.mark.parametrize("clipping", [0.0, -1.0, float("nan")])
def test_bounds_that_are_not_positive_are_refused(clipping):
    with pytest.raises(ValueError, match="above 0"):
        AGC(clipping)
    with pytest.raises(ValueError, match="above 0"):
        AGC(0.1, floor=clipping)
    with pytest.raises(ValueError, match="above 0"):
        ClipNorm(clipping)
