"""Normalization by running estimates: the authors' rule, moves at the end of a step, warm-up, and no gradient."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchless.nn as bnn
import reference
from batchless.nn.estimated_batch_norm import centred_moments, move_rate
from batchless.nn.fused_batch_channel_norm import can_fuse
from batchless.nn.step_estimates import StepEstimates
from layers_table import scrambled

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@st.composite
def forwards(draw: st.DrawFn) -> list[Tensor]:
    """One to four inputs of one channel count, of different sizes, scales and means."""
    channels, rank = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    inputs = []
    for _ in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 3)), channels, *draw(st.tuples(*[st.integers(1, 4)] * rank)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        scale, mean = draw(st.sampled_from([0.1, 3.0])), draw(st.sampled_from([-2.0, 0.0, 5.0]))
        inputs.append(scale * torch.randn(shape, generator=generator, dtype=torch.float64) + mean)
    return inputs


class AuthorsEstBN(nn.Module):
    """The authors' published layer for any rank, its rate given at each call (their buffer for it stays 0)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(num_features)) for _ in range(2))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor, rate: float) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        if self.training:
            with torch.no_grad():
                values = x.detach().transpose(0, 1).flatten(1)
                mean = values.mean(1)
                var = ((values - self.running_mean[:, None]) ** 2).mean(1)
                self.running_mean.mul_(1 - rate).add_(rate * mean)
                self.running_var.mul_(1 - rate).add_(rate * var)
        normalized = (x - self.running_mean.view(shape)) / torch.sqrt(self.running_var.view(shape) + 1e-5)
        return self.weight.view(shape) * normalized + self.bias.view(shape)


@given(forwards(), st.sampled_from([1.0, 7.5, 200.0]), st.booleans())
def test_equals_the_authors_rule_in_training_and_evaluation(inputs, memory, affine):
    ours = scrambled(bnn.EstimatedBatchNorm(inputs[0].shape[1], memory=memory, warmup=False, affine=affine).double())
    theirs = AuthorsEstBN(inputs[0].shape[1]).double()
    state = {"weight": torch.ones_like(theirs.weight), "bias": torch.zeros_like(theirs.bias)} | ours.state_dict()
    theirs.load_state_dict({name: state[name] for name in theirs.state_dict()})
    for x in inputs:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        rate = reference.move_rate(len(x), memory)
        outputs = ours(leaves[0]), theirs(leaves[1], rate)
        torch.testing.assert_close(*outputs, **EXACT)
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **EXACT)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, **EXACT)
        torch.testing.assert_close(ours.running_var, theirs.running_var, **EXACT)
    if affine:
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **EXACT)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, **EXACT)
    before = {name: value.clone() for name, value in ours.named_buffers()}
    torch.testing.assert_close(ours.eval()(inputs[0]), theirs.eval()(inputs[0], 0.0), **EXACT)
    assert all(torch.equal(value, before[name]) for name, value in ours.named_buffers())


@given(forwards(), st.sampled_from([1.0, 7.5, 200.0]), st.booleans())
def test_equals_the_reference(inputs, memory, warmup):
    layer = bnn.EstimatedBatchNorm(inputs[0].shape[1], memory=memory, warmup=warmup).double()
    mean, var = torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var)
    for move, x in enumerate(inputs, start=1):
        warms_up = warmup and x[:, 0].numel() > 1  # one value has no variance
        rate = reference.move_rate(len(x), memory, move=move if warms_up else None)
        mean, var = reference.moved_estimates(mean, var, x, rate)
        y = layer(x)
        torch.testing.assert_close(layer.running_mean, mean, **EXACT)
        torch.testing.assert_close(layer.running_var, var, **EXACT)
        torch.testing.assert_close(y, reference.normalize_by(x, mean, var, layer.weight, layer.bias), **EXACT)
    assert layer.moves == len(inputs)


@given(forwards(), st.integers(1, 64), st.sampled_from([1.0, 7.5, 200.0]), st.booleans())
def test_a_step_moves_the_estimates_once_by_all_its_forwards(inputs, images, memory, warmup):
    layer = scrambled(bnn.EstimatedBatchNorm(inputs[0].shape[1], memory=memory, warmup=warmup).double())
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    step = StepEstimates([layer])
    for move in (1, 2):
        step.start()
        for x in inputs:
            y = layer(x)
            torch.testing.assert_close(layer.running_mean, mean, **EXACT)
            torch.testing.assert_close(y, reference.normalize_by(x, mean, var, layer.weight, layer.bias), **EXACT)
        step.move(images)
        step.stop()
        rate = reference.move_rate(images, memory, move=move if warmup else None)
        mean, var = reference.accumulated_estimates(mean, var, inputs, rate)
        torch.testing.assert_close(layer.running_mean, mean, **EXACT)
        torch.testing.assert_close(layer.running_var, var, **EXACT)
        assert layer.moves == move


@given(st.lists(st.sampled_from([(1, 16, 8), (2, 16, 8), (1, 12, 12), (3, 3, 5)]), min_size=1, max_size=12))
def test_what_a_step_collects_is_that_of_all_its_forwards(shapes):
    """Small and large inputs, of one size and of several, and more of them than wait to be summed together."""
    layer = scrambled(bnn.BatchChannelNorm(4, 2).double())
    estimates = layer.batch_norm
    inputs = [torch.randn(samples, 4, *rest, dtype=torch.float64) for samples, *rest in shapes]
    mean, var = estimates.running_mean.clone(), estimates.running_var.clone()
    rate = reference.move_rate(3, float(estimates.memory), move=1)
    mean, var = reference.accumulated_estimates(mean, var, inputs, rate)
    step = StepEstimates([estimates])
    step.start()
    for x in inputs:
        assert can_fuse(x, estimates.running_mean)
        layer(x)
    step.move(3)
    step.stop()
    torch.testing.assert_close(estimates.running_mean, mean, **EXACT)
    torch.testing.assert_close(estimates.running_var, var, **EXACT)


@st.composite
def steps_of_layers(draw: st.DrawFn) -> list[tuple[int, list[tuple[int, ...]]]]:
    """For some layers their channels and the inputs `[N, C, H, W]` of a step: none to six, with moments that wait or not."""
    layers = []
    for channels in draw(st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=4)):
        shape = st.tuples(st.integers(1, 3), st.just(channels), st.sampled_from([2, 6, 8]), st.just(6))
        layers.append((channels, draw(st.lists(shape, max_size=6))))
    return layers


@given(steps_of_layers(), st.sampled_from([1, 5, torch.tensor(3)]), st.booleans())
def test_layers_together_move_as_each_by_the_reference(drawn, images, single):
    """Layers of other widths, with other numbers of samples and positions, the first in float32 at times."""
    norms = [scrambled(bnn.BatchChannelNorm(channels, 1).double()) for channels, _ in drawn]
    inputs = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _, shapes in drawn]
    if single:
        norms[0].float()
        inputs[0] = [x.float() for x in inputs[0]]
    layers = [norm.batch_norm for norm in norms]
    step = StepEstimates(layers)
    for move in (1, 2):
        before = [(layer.running_mean.double().clone(), layer.running_var.double().clone()) for layer in layers]
        step.start()
        for turn in range(6):
            for norm, seen in zip(norms, inputs, strict=True):
                if turn < len(seen):
                    norm(seen[turn])
        step.move(images)
        step.stop()
        for layer, (mean, var), seen in zip(layers, before, inputs, strict=True):
            tolerance = EXACT if layer.running_mean.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
            if seen:
                rate = reference.move_rate(int(images), float(layer.memory), move=move)
                mean, var = reference.accumulated_estimates(mean, var, [x.double() for x in seen], rate)
            torch.testing.assert_close(layer.running_mean.double(), mean, **tolerance)
            torch.testing.assert_close(layer.running_var.double(), var, **tolerance)
            assert layer.moves == (move if seen else 0)
            assert layer.step_sums is None


def test_many_layers_move_together_and_the_unused_stay():
    def layers() -> list[nn.Module]:
        return [scrambled(bnn.EstimatedBatchNorm(c, memory=m, warmup=w).double()) for c, m, w in settings]

    settings = [(2, 10.0, True), (3, 200.0, False), (4, 10.0, True), (1, 50.0, True)]
    together, alone = layers(), layers()
    inputs = {
        2: torch.randn(2, 2, 4).double(),
        3: torch.randn(1, 3).double(),
        4: torch.randn(0, 4, 3).double(),
        1: None,
    }
    for layers_of_a_step in (together, *([layer] for layer in alone)):
        step = StepEstimates(layers_of_a_step)
        step.start()
        for layer in layers_of_a_step:
            if (x := inputs[layer.num_features]) is not None:
                layer(x)
        step.move(torch.tensor(5) if layers_of_a_step is together else 5)
    fresh = layers()
    for index, (a, b, c) in enumerate(zip(together, alone, fresh, strict=True)):
        for name, value in a.state_dict().items():
            torch.testing.assert_close(value, b.state_dict()[name], **EXACT)
            if index >= 2:
                torch.testing.assert_close(value, c.state_dict()[name], rtol=0, atol=0)
    nothing = StepEstimates([])
    nothing.start()
    assert nothing.sums() == []
    nothing.move(5)


def test_sums_of_two_ranks_or_of_a_doubled_forward_give_the_same_move():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    once, doubled, split = (scrambled(bnn.EstimatedBatchNorm(4).double()) for _ in range(3))
    steps = [StepEstimates([layer]) for layer in (once, doubled, split)]
    for step in steps:
        step.start()
    once(x)
    doubled(x)
    doubled(x)
    split(x[:1])
    split(x[1:])
    for step in steps:
        step.move(3)
    for layer in (doubled, split):
        torch.testing.assert_close(layer.running_mean, once.running_mean, **EXACT)
        torch.testing.assert_close(layer.running_var, once.running_var, **EXACT)


@given(st.integers(1, 500), st.sampled_from([1.0, 2.0, 200.0, 1e6]), st.integers(1, 1000), st.booleans())
def test_the_rate_of_a_move(images, memory, move, warmup):
    moves = torch.tensor(move) if warmup else None
    ours = float(move_rate(images, torch.tensor(memory, dtype=torch.float64), moves))
    assert ours == pytest.approx(reference.move_rate(images, memory, move=move if warmup else None), rel=1e-9)


@pytest.mark.parametrize("memory", [1.0, 7.5, 200.0, math.inf])
def test_a_move_of_no_images_has_rate_zero(memory):
    assert move_rate(0, torch.tensor(memory), None) == 0


def test_the_memory_is_kept_however_images_are_split_into_moves():
    """Without the warm-up, k moves of one image forget as much as one move of k images."""
    x = torch.full((1, 1, 4), 3.0, dtype=torch.float64)
    one_by_one, at_once = (bnn.EstimatedBatchNorm(1, memory=20.0, warmup=False).double() for _ in range(2))
    for _ in range(8):
        one_by_one(x)
    at_once(x.expand(8, 1, 4))
    torch.testing.assert_close(one_by_one.running_mean, at_once.running_mean, **EXACT)
    assert float(at_once.running_mean) == pytest.approx(3 * (1 - 0.95**8))


def test_the_warmup_averages_what_it_has_seen():
    layer = bnn.EstimatedBatchNorm(1, memory=1e9).double()
    inputs = [torch.randn(1, 1, 6, dtype=torch.float64) + k for k in range(5)]
    for x in inputs:
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.cat(inputs).mean().view(1), rtol=1e-7, atol=1e-7)


@given(forwards())
def test_no_gradient_flows_through_the_estimates(inputs):
    layer = scrambled(bnn.EstimatedBatchNorm(inputs[0].shape[1]).double())
    x = inputs[0].requires_grad_()
    functional = torch.randn_like(x)
    (layer(x) * functional).sum().backward()
    shape = (1, -1, *[1] * (x.dim() - 2))
    slope = layer.weight / torch.sqrt(layer.running_var + layer.eps)
    torch.testing.assert_close(x.grad, functional * slope.view(shape), **EXACT)
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_statistics_of_a_mean_ten_thousand_times_the_deviation():
    """Squares are taken about the estimate: once it is near the mean, float32 loses nothing."""
    x = torch.randn(2, 5, 16, 16) + 1e4
    layer, exact = bnn.EstimatedBatchNorm(5, memory=1.0), bnn.EstimatedBatchNorm(5, memory=1.0).double()
    for module in (layer, exact):
        module.running_mean.fill_(1e4 + 0.25)
    y, expected = layer(x), exact(x.double())
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=0)
    # A float32 mean near 1e4 is known to 5e-4 deviations.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("collecting", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_inputs_have_float32_statistics(dtype, collecting):
    x = (30 * torch.randn(4, 5, 64, 64) + 300).to(dtype)  # sums and squares overflow fp16
    layer, exact = bnn.EstimatedBatchNorm(5), bnn.EstimatedBatchNorm(5).double()
    for module, values in ((layer, x), (exact, x.double())):
        step = StepEstimates([module] if collecting else [])
        step.start()
        module(values)
        step.move(4)
        step.stop()
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-4, atol=0)
    assert layer.eval()(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_layer_in_half_precision_moves_by_float32_statistics(dtype):
    x = (2 * torch.randn(4, 5, 64, 64) + 1).to(dtype)
    layer, exact = bnn.EstimatedBatchNorm(5).to(dtype), bnn.EstimatedBatchNorm(5).double()
    layer(x)
    exact(x.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=eps, atol=eps)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=eps, atol=eps)


def test_centred_moments_are_about_the_centre():
    x, centre = torch.randn(3, 2, 5, dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    shift, square = centred_moments(x, centre)
    for c in range(2):
        torch.testing.assert_close(shift[c], (x[:, c] - centre[c]).mean(), **EXACT)
        torch.testing.assert_close(square[c], ((x[:, c] - centre[c]) ** 2).mean(), **EXACT)


def test_a_batch_of_one_moves_the_estimates_and_trains():
    layer = bnn.EstimatedBatchNorm(3)
    layer(torch.randn(1, 3)).square().sum().backward()
    assert layer.moves == 1
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("warmup", [True, False])
def test_a_first_move_by_one_value_leaves_something_of_it(warmup):
    layer = bnn.EstimatedBatchNorm(3, warmup=warmup)
    values = torch.tensor([[-2.0, 0.5, 3.0]], requires_grad=True)
    for shape in ((1, 3), (1, 3, 1, 1)):
        layer.reset_estimates()
        normalized = layer(values.view(shape)).flatten()
        # The rate of a memory of 200 images.
        expected = values[0] * (1 - 1 / 200) / (1 - 1 / 200 + values[0].square() / 200 + 1e-5).sqrt()
        torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_is_no_move():
    layer = bnn.EstimatedBatchNorm(3)
    assert layer(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    assert layer.moves == 0
    layer.start_collecting()
    layer(torch.randn(0, 3, 4))
    assert (layer.step_sums == 0).all()


def test_reset():
    layer = bnn.EstimatedBatchNorm(3, memory=5.0)
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(2, 3))
    assert not torch.equal(layer.running_mean, fresh["running_mean"])
    layer.reset_estimates()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())


def test_the_memory_is_a_buffer_that_a_schedule_sets_and_checkpoints_keep():
    layer = bnn.EstimatedBatchNorm(2, memory=50.0)
    layer.memory.fill_(7.0)
    fresh = bnn.EstimatedBatchNorm(2)
    assert fresh.memory == 200
    fresh.load_state_dict(layer.state_dict())
    assert fresh.memory == 7


def test_a_memory_without_end_warns():
    with pytest.warns(UserWarning, match="rate 0"):
        layer = bnn.EstimatedBatchNorm(2, memory=math.inf, warmup=False)
    layer(torch.randn(4, 2))
    assert (layer.running_mean == 0).all()
    assert (layer.running_var == 1).all()


def test_a_memory_without_end_and_a_warmup_is_the_average_of_all():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # r = 1/t is not 0: nothing to warn of
        layer = bnn.EstimatedBatchNorm(1, memory=math.inf).double()
    inputs = torch.randn(6, 1, 1, 5, dtype=torch.float64)
    for x in inputs:
        layer(x)
    torch.testing.assert_close(layer.running_mean, inputs.mean().view(1), **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0.5}, "memory.*1 or more, got 0.5"),
        ({"memory": math.nan}, "memory.*got nan"),
        ({"update": "never"}, "'step' or 'forward', got 'never'"),
        ({"eps": 0.0}, "eps must be above 0"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bnn.EstimatedBatchNorm(4, **options)


@pytest.mark.parametrize("shape", [(2, 5, 3), (4,), ()])
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_input_is_refused(shape, training):
    with pytest.raises(ValueError, match=r"expected an input \[N, 4, \.\.\]"):
        bnn.EstimatedBatchNorm(4).train(training)(torch.randn(shape))
