"""The fused form of micro-batch BCN: the composed form's values and gradients, from less memory, and only where it holds."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchless.nn as bnn
from batchless.nn import batch_channel_norm, fused_batch_channel_norm
from batchless.nn.fused_batch_channel_norm import can_fuse, fused_again
from batchless.nn.normalized_samples import normalize_samples

fused = fused_batch_channel_norm.fused_batch_channel_norm


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor], int]:
    """Input, the four affine vectors, estimates, and groups, in float64."""
    groups, width = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), groups * width, *draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = groups * width
    affine = [normal(channels), normal(channels), normal(groups), normal(groups)]
    estimates = normal(channels), normal(channels).square() + 0.1
    return 2 * normal(*shape) + 0.5, affine, estimates, groups


def composed(x: Tensor, affine: Sequence[Tensor], estimates: tuple[Tensor, Tensor], groups: int) -> Tensor:
    """The readable form, by torch's kernels."""
    gamma, beta, gain, bias = affine
    y = F.batch_norm(x, *estimates, gamma, beta, False, 0.0, 1e-5)
    repeat = x.shape[1] // groups
    return F.group_norm(y, groups, gain.repeat_interleave(repeat), bias.repeat_interleave(repeat), 1e-5)


FORMS = {"of-vectors": 0, "small": 10**9}
"""The limit that makes every input here take one form."""


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    """Runs a test with each of the two fused forms."""
    monkeypatch.setattr(fused_batch_channel_norm, "SMALL", FORMS[request.param])
    return request.param


def check(values: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(values, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def with_gradients(run: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in values]
    y = run(*leaves)
    direction = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * direction).sum(), leaves)]


@pytest.mark.parametrize("name", FORMS)
@given(problem=problems())
def test_values_and_gradients_are_the_composed_forms(name, problem):
    x, affine, estimates, groups = problem
    assume(x[0].numel() > groups)  # one value per group is refused by the layer

    def ours(x: Tensor, *affine: Tensor) -> Tensor:
        samples = normalize_samples(x)
        return fused(x, samples, estimates, affine[:2], affine[2:], num_groups=groups, eps=1e-5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_batch_channel_norm, "SMALL", FORMS[name])
        found = with_gradients(ours, [x, *affine])
    check(found, with_gradients(lambda x, *affine: composed(x, affine, estimates, groups), [x, *affine]))


@given(problems())
def test_statistics_of_the_batch_pass_gradients_on(problem):
    x, affine, _, groups = problem
    assume(x[0].numel() > groups and x.numel() > x.shape[1])

    def ours(x: Tensor, *affine: Tensor) -> Tensor:
        samples = normalize_samples(x)
        statistics = samples.batch_statistics()
        return fused(x, samples, statistics, affine[:2], affine[2:], num_groups=groups, eps=1e-5, of_batch=True)

    check(with_gradients(ours, [x, *affine]), with_gradients(lambda x, *affine: large(x, affine, groups), [x, *affine]))


def large(x: Tensor, affine: tuple[Tensor, ...], groups: int) -> Tensor:
    """Large-batch BCN by torch's kernels."""
    gamma, beta, gain, bias = affine
    y = F.batch_norm(x, None, None, gamma, beta, True, 0.0, 1e-5)
    repeat = x.shape[1] // groups
    return F.group_norm(y, groups, gain.repeat_interleave(repeat), bias.repeat_interleave(repeat), 1e-5)


@given(problems())
def test_moments_are_those_of_each_sample_and_channel(problem):
    x, *_ = problem
    found = normalize_samples(x)
    mean, var = found.mean, found.rstd.pow(-2)
    torch.testing.assert_close(mean, x.flatten(2).mean(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, x.flatten(2).var(2, correction=0), rtol=1e-10, atol=1e-12)


def layer(**options: object) -> bnn.BatchChannelNorm:
    torch.manual_seed(3)
    made = bnn.BatchChannelNorm(16, 4, memory=20.0, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        made.batch_norm.running_mean.copy_(torch.randn(16))
        made.batch_norm.running_var.copy_(torch.rand(16) + 0.5)
    return made


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry for each forward that was fused."""
    seen: list[int] = []

    def counted(*values, **options):
        seen.append(1)
        return fused(*values, **options)

    monkeypatch.setattr(batch_channel_norm, "fused_batch_channel_norm", counted)
    return seen


def run_composed(module: bnn.BatchChannelNorm, x: Tensor) -> Tensor:
    """The layer's forward with a hook in the way, which the fused form would pass by."""
    handle = module.batch_norm.register_forward_hook(lambda *_: None)
    try:
        return module(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.usefixtures("form")
def test_the_layer_moves_its_estimates_alike(training, affine, calls):
    modules = [layer(affine=affine).double().train(training) for _ in range(2)]
    for _ in range(3):
        x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(modules[0](x), run_composed(modules[1], x), rtol=1e-11, atol=1e-11)
    assert len(calls) == 3
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(value, modules[1].state_dict()[name], rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_of_large_batches_tracks_alike(training, calls, monkeypatch):
    monkeypatch.setattr(batch_channel_norm, "SMALL", 0)
    modules = [bnn.BatchChannelNorm(16, 4, statistics="batch").double().train(training) for _ in range(2)]
    for _ in range(3):
        x = 2 * torch.randn(3, 16, 5, 4, dtype=torch.float64) + 1
        torch.testing.assert_close(modules[0](x), run_composed(modules[1], x), rtol=1e-11, atol=1e-11)
    assert len(calls) == 3
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(value, modules[1].state_dict()[name], rtol=1e-11, atol=1e-11)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(sizes.values())


@pytest.mark.usefixtures("form")
def test_what_is_saved_is_the_input_and_vectors():
    x = torch.randn(1, 16, 64, 64).requires_grad_()
    of_input, vectors = x.numel() * 4, 16 * 4 * 12
    batch_norm = nn.BatchNorm2d(16)
    assert saved_bytes(layer(), x) <= of_input + vectors
    assert saved_bytes(layer(), x) <= 1.01 * saved_bytes(batch_norm, x)
    handle = (made := layer()).batch_norm.register_forward_hook(lambda *_: None)
    assert saved_bytes(made, x) >= 2 * of_input  # so the count does count
    handle.remove()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_much_larger_than_the_deviation(ratio):
    """float32 against float64: no difference of large squares. Inputs of such a mean carry an error of ratio * 6e-8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 9, 9, generator=generator, dtype=torch.float64) + ratio
    single = x.float()
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        module = layer().to(dtype).train()
        module.batch_norm.reset_estimates()
        leaf = single.to(dtype).requires_grad_()
        y = module(leaf)
        (gradient,) = torch.autograd.grad((y * direction.to(dtype)).sum(), leaf)
        results.append((y.detach().double(), gradient.double()))
    tolerance = 1e-6 * ratio
    for ours, exact in zip(*results, strict=True):
        assert float((ours - exact).abs().max()) <= tolerance * float(exact.abs().max())


@pytest.mark.usefixtures("form")
def test_a_constant_input_has_finite_gradients():
    module, x = layer().eval(), torch.full((2, 16, 4, 4), 3.0, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.usefixtures("form")
def test_an_activation_may_write_over_the_output():
    leaves = [torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for leaf, activation in zip(leaves, (nn.ReLU(inplace=True), nn.ReLU()), strict=True):
        activation(layer().eval()(leaf)).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=0)


@pytest.mark.parametrize("affine", [True, False])
def test_its_output_is_made_again_to_the_same_bits(form, affine, monkeypatch):
    x = 3 + torch.randn(2, 16, 5, 4)
    output = layer(affine=affine)(x.requires_grad_())
    again, before = fused_again(output), x.detach().clone()
    assert again is not None
    if form == "of-vectors":  # the vectors are there: what is left are passes over x
        monkeypatch.setattr(Tensor, "mean", None)
    with torch.no_grad():
        assert torch.equal(again(x), output)
    assert torch.equal(x, before)
    assert fused_again(x) is None
    assert fused_again(output * 2) is None


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", [(3, 16, 1, 1), (2, 16, 1, 1, 1)])
@pytest.mark.filterwarnings("ignore:channel normalization of")
def test_strides_that_fit_two_memory_formats(shape, calls):
    """A map of one position is contiguous in channels_last too, and torch's kernels ask its strides which of them it is."""
    x, direction = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    results = []
    for memory_format in (torch.contiguous_format, last):
        leaf = x.clone(memory_format=memory_format).requires_grad_()
        assert leaf.is_contiguous()
        module = layer().double()
        y = module(leaf)
        y.backward(direction.clone(memory_format=memory_format))
        results.append([y, leaf.grad, module.batch_norm.running_var, *(p.grad for p in module.parameters())])
    assert len(calls) == 2
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12, check_stride=False)


@pytest.mark.usefixtures("form")
def test_a_second_derivative_is_refused():
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "case", ["channels-last", "half", "autocast", "empty", "vector", "hook", "other-eps", "functional", "mixed"]
)
def test_elsewhere_the_composed_form_is_used(case, calls):
    module, x = layer(), torch.randn(2, 16, 4, 4)
    match case:
        case "channels-last":
            module(x.to(memory_format=torch.channels_last))
        case "half":
            module.bfloat16()(x.bfloat16())
        case "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                module(x)
        case "empty":
            module(x[:0])
        case "vector":
            with pytest.warns(UserWarning, match="values per group"):
                module(x[:, :, 0, 0])
        case "hook":
            run_composed(module, x)
        case "other-eps":
            module.batch_norm.eps = 1e-3
            module(x)
        case "functional":
            torch.func.grad(lambda value: module.eval()(value).sum())(x)
        case "mixed":
            assert not can_fuse(x, x.double())
    assert not calls
    module.float()
    module.batch_norm.eps = module.eps
    module(x)
    assert len(calls) == 1
