"""Generic suites over the table of all layers: `torch.compile` and `torch.export`."""

import copy

import pytest
import torch
from torch import Tensor, nn

import batchless.nn as bnn
from batchless.nn.step_estimates import StepEstimates
from layers_table import LAYERS, Layer

# A reparameterized layer does not look at its mode: once is enough.
MODES = [(layer, training) for layer in LAYERS for training in (True, False) if training or layer.kind == "norm"]
in_both_modes = pytest.mark.parametrize(
    ("layer", "training"), MODES, ids=[f"{layer.name}-{'train' if training else 'eval'}" for layer, training in MODES]
)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def equal_after_two_steps(compiled: nn.Module, eager: nn.Module, layer: Layer) -> None:
    """Outputs, gradients and buffers of two forwards and backwards on different inputs, to float64 rounding."""
    for factor in (1.0, 0.5):
        x = layer.input(dtype=torch.float64) * factor
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y, expected = compiled(leaves[0]), eager(leaves[1])
        functional = torch.randn_like(expected)
        for value in (y, expected):
            (value * functional).sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@in_both_modes
def test_compiled_without_graph_breaks_equals_eager(layer: Layer, training: bool):
    module = layer.build(dtype=torch.float64).train(training)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    equal_after_two_steps(compiled, module, layer)


def inductor_cases() -> list[Layer]:
    names = ("WSConv2d", "BatchChannelNorm-estimate", "BatchChannelNorm-batch")
    return [layer for layer in LAYERS if layer.name in names]


@pytest.mark.parametrize("layer", inductor_cases(), ids=lambda layer: layer.name)
def test_compiled_by_inductor_equals_eager(layer: Layer):
    module = layer.build(dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    equal_after_two_steps(compiled, module, layer)


def test_a_schedule_of_the_memory_does_not_recompile():
    layer = next(layer for layer in LAYERS if layer.name == "EstimatedBatchNorm")
    module = layer.build(dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    equal_after_two_steps(compiled, module, layer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for memory in (10.0, 500.0):
            for estimates in (module, compiled):
                estimates.memory.fill_(memory)
            equal_after_two_steps(compiled, module, layer)


def test_collecting_for_a_step_equals_eager_and_compiles_once():
    layer = next(layer for layer in LAYERS if layer.name == "EstimatedBatchNorm")
    module = layer.build(dtype=torch.float64)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")

    steps = [StepEstimates([estimates]) for estimates in (module, twin)]

    def step() -> None:
        for estimates in steps:
            estimates.start()
        equal_after_two_steps(compiled, module, layer)
        torch.testing.assert_close(*(estimates.sums() for estimates in steps), rtol=1e-12, atol=1e-12)
        for estimates in steps:
            estimates.move(6)
            estimates.stop()
        torch.testing.assert_close(twin.running_var, module.running_var, rtol=1e-12, atol=1e-12)

    step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        step()


@in_both_modes
def test_exported_program_gives_the_same_outputs(layer: Layer, training: bool):
    module = layer.build(dtype=torch.float64).train(training)
    batch = {0: torch.export.Dim("batch", min=1)}
    # A copy: an exported program holds the very buffers of the module, and would move them too.
    twin, x = copy.deepcopy(module), layer.input(dtype=torch.float64)
    exported = torch.export.export(twin, (x,), dynamic_shapes=(batch,)).module()
    for samples in (None, 5, 1):
        x = layer.input(samples=samples, dtype=torch.float64)
        torch.testing.assert_close(exported(x), module(x), rtol=1e-12, atol=1e-12)
    state = dict(module.named_buffers())
    for name, value in exported.named_buffers():
        torch.testing.assert_close(value, state[name], rtol=1e-12, atol=1e-12)


def test_a_compiled_network_of_every_kind_trains_like_the_eager_one():
    def network() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(
            bnn.WSConv2d(3, 8, 3, padding=1),
            bnn.BatchChannelNorm(8, memory=20.0),
            nn.ReLU(),
            bnn.ScaledWSConv2d(8, 8, 3, padding=1, gamma=1.7, gain=True),
            bnn.BatchChannelNorm(8, statistics="batch"),
            nn.ReLU(),
            bnn.CWNConv2d(8, 4, 1),
        ).double()

    networks = (network(), network())
    runs = (torch.compile(networks[0], fullgraph=True, backend="aot_eager"), networks[1])
    losses: list[list[Tensor]] = []
    for model, run in zip(networks, runs, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(5)
        losses.append([])
        for _ in range(4):
            loss = run(torch.randn(2, 3, 6, 6, dtype=torch.float64)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-9, atol=0)
    for ours, theirs in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
