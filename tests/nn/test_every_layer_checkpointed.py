"""Activation checkpointing: gradients, running statistics and estimates equal those of the run without it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchless.nn as bnn
from batchless.nn.step_estimates import StepEstimates
from layers_table import LAYERS, Layer, scrambled

Call = Callable[[nn.Module, Tensor], Tensor]

both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
every_norm = pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer.kind == "norm"], ids=lambda layer: layer.name
)


def plainly(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def checkpointed(reentrant: bool) -> Call:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=reentrant)

    return call


def image(scale: float = 1.0, *, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(int(scale * 1000))
    return scale * torch.randn(2, channels, 6, 5, generator=generator, dtype=torch.float64) + scale


def block(norm: Layer, inputs: int) -> nn.Sequential:
    channels = norm.arguments[0]
    return nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1), norm.build(), nn.ReLU())


def two_blocks(norm: Layer) -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(block(norm, 3), block(norm, norm.arguments[0])).double()


def outcome(model: nn.Module, losses: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Gradients and buffers after one backward pass."""
    losses(model).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


def equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        # The same operations on the same numbers: only the order of summing gradients differs.
        torch.testing.assert_close(
            ours[name], value, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@both_kinds
def test_a_checkpointed_layer(layer: Layer, reentrant: bool):
    results = []
    for call in (plainly, checkpointed(reentrant)):
        x = layer.input(dtype=torch.float64).requires_grad_()
        module = layer.build(dtype=torch.float64)
        result = outcome(module, lambda m, x=x, call=call: call(m, x).square().sum())
        results.append(result | {"gradient of the input": x.grad})
    equal(results[1], results[0])


@every_norm
@both_kinds
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_stack_with_each_block_checkpointed(layer: Layer, reentrant: bool, training: bool):
    def losses(call: Call) -> Callable[[nn.Module], Tensor]:
        x = image().requires_grad_()  # a reentrant checkpoint passes gradients only if an input requires them
        return lambda model: call(model[1], call(model[0], x)).square().mean()

    model = two_blocks(layer).train(training)
    expected = outcome(copy.deepcopy(model), losses(plainly))
    equal(outcome(copy.deepcopy(model), losses(checkpointed(reentrant))), expected)


@every_norm
@both_kinds
def test_layers_called_in_several_checkpoints_before_backward(layer: Layer, reentrant: bool):
    def losses(call: Call) -> Callable[[nn.Module], Tensor]:
        def loss(model: nn.Module) -> Tensor:
            images = [image(scale).requires_grad_() for scale in (1.0, 0.25, 3.0)]
            outputs = [call(model[1], call(model[0], x)) for x in images]
            return sum(y.square().mean() for y in outputs)

        return loss

    model = two_blocks(layer)
    expected = outcome(copy.deepcopy(model), losses(plainly))
    equal(outcome(copy.deepcopy(model), losses(checkpointed(reentrant))), expected)


@every_norm
@both_kinds
def test_one_checkpoint_around_a_layer_that_runs_three_times(layer: Layer, reentrant: bool):
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block(layer, 3)

        def forward(self, x: Tensor) -> Tensor:
            levels = [x, x[..., ::2, ::2], x[..., ::3, ::3]]
            return torch.cat([self.block(level).flatten() for level in levels])

    torch.manual_seed(7)
    model = Pyramid().double()
    results = []
    for call in (plainly, checkpointed(reentrant)):
        x = image().requires_grad_()
        results.append(outcome(copy.deepcopy(model), lambda m, x=x, call=call: call(m, x).square().mean()))
    equal(results[1], results[0])


@every_norm
@both_kinds
def test_training_steps_in_a_row(layer: Layer, reentrant: bool):
    """Three optimizer steps; the same images come again, as in every second epoch."""
    finals = []
    for call in (plainly, checkpointed(reentrant)):
        model = two_blocks(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for scale in (1.0, 0.5, 1.0):
            x = image(scale).requires_grad_()
            call(model[1], call(model[0], x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(model.state_dict())
    equal(finals[1], finals[0])


@both_kinds
def test_an_image_that_returns_uses_the_estimates_of_its_own_step(reentrant: bool):
    """Behind a frozen stem a layer sees bit-equal inputs whenever an image returns, its estimates having moved on."""
    torch.manual_seed(10)
    stem = nn.Conv2d(3, 6, 3).requires_grad_(False)
    norm = scrambled(bnn.EstimatedBatchNorm(6, memory=4.0))
    results = []
    for call in (plainly, checkpointed(reentrant)):
        model = copy.deepcopy(nn.Sequential(stem, norm)).double()
        gradients = {}
        for step in range(4):
            x = image().requires_grad_()
            call(model, x).square().mean().backward()
            gradients[f"gradient of the input in step {step}"] = x.grad
        results.append(gradients | dict(model.named_buffers()))
    equal(results[1], results[0])


@both_kinds
def test_equal_inputs_before_one_backward_use_their_own_estimates(reentrant: bool):
    layer = next(layer for layer in LAYERS if layer.name == "EstimatedBatchNorm")
    gradients = []
    for call in (plainly, checkpointed(reentrant)):
        module = layer.build(dtype=torch.float64)
        leaves = [layer.input(dtype=torch.float64).requires_grad_() for _ in range(2)]
        sum(call(module, x).square().mean() for x in leaves).backward()
        gradients.append({f"gradient of input {i}": x.grad for i, x in enumerate(leaves)})
    equal(gradients[1], gradients[0])


@both_kinds
@pytest.mark.parametrize("latest_first", [False, True], ids=["first-first", "latest-first"])
def test_almost_equal_inputs_and_any_order_of_backward(reentrant: bool, latest_first: bool):
    """Two exposures of one picture: what tells them apart is small, and each needs its own estimates."""
    results = []
    for call in (plainly, checkpointed(reentrant)):
        module = scrambled(bnn.EstimatedBatchNorm(3, memory=4.0)).double()
        leaves = [(factor * image()).requires_grad_() for factor in (1.0, 1.0001, 0.9999)]
        losses = [call(module, x).square().mean() for x in leaves]
        for loss in reversed(losses) if latest_first else losses:
            loss.backward()
        results.append({f"gradient of input {k}": x.grad for k, x in enumerate(leaves)})
    equal(results[1], results[0])


@both_kinds
def test_under_autocast(reentrant: bool):
    torch.manual_seed(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), bnn.BatchChannelNorm(8, memory=20.0), nn.ReLU())
    results = []
    for call in (plainly, checkpointed(reentrant)):
        twin, x = copy.deepcopy(model), image().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(twin, x).square().mean() + call(twin, 2 * x).square().mean()
        results.append(outcome(twin, lambda m, loss=loss: loss))
    for name, value in results[0].items():
        # Gradients of the two calls are added in bf16 or float32 depending on the kind of checkpoint.
        torch.testing.assert_close(results[1][name], value, rtol=0.02, atol=0.02 * float(value.abs().max()))


@both_kinds
def test_collecting_inside_a_step_is_not_changed_by_checkpoints(reentrant: bool):
    results = []
    for call in (plainly, checkpointed(reentrant)):
        torch.manual_seed(9)
        module = scrambled(bnn.EstimatedBatchNorm(3)).double()
        step = StepEstimates([module])
        step.start()
        for scale in (1.0, 2.0):
            x = image(scale).requires_grad_()
            call(module, x).square().mean().backward()
        (sums,) = step.sums()
        moments = sums[:-1] / sums[-1]  # recomputation may double sums and count alike
        results.append({"moments": moments, "gradient": module.weight.grad, **dict(module.named_buffers())})
    equal(results[1], results[0])


@pytest.mark.parametrize("compile_first", [False, True], ids=["compiled-checkpoint", "checkpointed-compilation"])
def test_compiled_and_checkpointed_inside_a_step(compile_first: bool):
    """Outside a step a compiled checkpoint is not promised: there only eager mode replays estimates."""
    torch._dynamo.reset()
    results = []
    for call in (plainly, checkpointed(False)):
        torch.manual_seed(11)
        norm = scrambled(bnn.BatchChannelNorm(8))
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()).double()
        step = StepEstimates([norm.batch_norm])
        step.start()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        around = torch.compile(lambda x, call=call, model=model: call(model, x), fullgraph=True, backend="aot_eager")
        for scale in (1.0, 2.0):
            x = image(scale)
            (call(compiled, x) if compile_first else around(x)).square().mean().backward()
        (sums,) = step.sums()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        results.append(gradients | {"moments": sums[:-1] / sums[-1]})
    torch._dynamo.reset()
    equal(results[1], results[0])


def test_many_reentrant_forwards_of_one_layer_before_backward():
    """More calls than a detector's head has levels: every one finds its own estimates."""
    results = []
    for call in (plainly, checkpointed(True)):
        module = scrambled(bnn.EstimatedBatchNorm(3, memory=4.0)).double()
        leaves = [image(1 + 0.1 * k).requires_grad_() for k in range(48)]
        sum(call(module, x).square().mean() for x in leaves).backward()
        results.append({f"gradient of input {k}": x.grad for k, x in enumerate(leaves)})
    equal(results[1], results[0])


def test_a_recomputation_that_differs_is_not_silently_wrong():
    """Dropout whose mask is not restored: no forward matches, and NaN says so."""
    model = nn.Sequential(nn.Dropout(0.5), bnn.EstimatedBatchNorm(3))
    x = torch.randn(4, 3, 32, 32).requires_grad_()
    checkpoint(model, x, use_reentrant=False, preserve_rng_state=False).square().mean().backward()
    assert x.grad.isnan().any()
