"""The benchmarks' compiled contestants compute what the eager ones do, and keep what is counted; no time is asserted."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is run from the repository root, not installed

from bench.compilation import PARTITIONER, attempt, compiled, kept_by_graph
from bench.compiled import in_bfloat16
from bench.memory import dominated, share_weights
from bench.saved import saved_bytes, stand_still

import batchless as bl

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def network(normalizer: str) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model, _ = bl.convert(nn.Sequential(*layers), normalizer)
    stand_still([model.train()])
    return model


def gradients(model, forward):
    forward(IMAGE).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("normalizer", ["bn", "bcn-micro+ws"])
def test_a_budget_keeps_less_for_the_same_gradients(normalizer):
    model = network(normalizer)
    copies = {budget: copy.deepcopy(model) for budget in (1.0, 0.0)}
    expected = gradients(model, model)
    kept = {}
    for budget, copied in copies.items():
        # Alive at once and of the same shapes: neither may get the other's code.
        forward = compiled(copied, budget=budget, backend=PARTITIONER)
        kept[budget] = sum(kept_by_graph(forward(IMAGE), copied))
        torch.testing.assert_close(gradients(copied, forward), expected, **CLOSE)
    one_map = 4 * 2 * 64 * 16 * 16
    assert kept[0.0] < one_map < 3 * one_map <= kept[1.0] <= saved_bytes(model, IMAGE) + IMAGE.nbytes


def test_a_weight_in_another_layout_is_no_activation():
    model = nn.Conv2d(4, 6, 3)

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x * 1, weight.contiguous(memory_format=torch.channels_last), weight)
            return x + weight.sum()

    x = torch.ones(2, 5)
    activations, weights = kept_by_graph(Keeps.apply(x, model.weight) * 1, model)
    assert (activations, weights) == (4 * 10, 4 * 6 * 4 * 9)  # the weight itself is the model's


def test_a_failure_is_told_in_one_line():
    def fails():
        raise RuntimeError("no compiler\nand much more")

    seconds, failure = attempt(fails)
    assert seconds >= 0
    assert failure == "RuntimeError: no compiler"
    assert attempt(lambda: None)[1] == ""


def test_autocast_computes_in_bfloat16_and_gives_float32():
    model = nn.Linear(64, 8)
    x = torch.randn(4, 64)
    output = in_bfloat16(model, x)
    assert output.dtype == torch.float32
    assert torch.equal(output, output.bfloat16().float())
    assert not torch.equal(output, model(x))


def test_estimates_stand_still_and_weights_are_shared_while_memory_is_measured():
    model = network("bcn-micro+ws")
    other = copy.deepcopy(model)
    with bl.standardized(model):
        share_weights(model, [other])
        assert other[0].shared_weight is model[0].shared_weight
        other(IMAGE)
        share_weights(None, [other])
        assert other[0].shared_weight is None
    assert bool((other[1].batch_norm.running_mean == 0).all())


def test_a_level_is_dominated_by_what_keeps_less_in_less_time():
    times = {"plain": (1.0,), "lean 1": (2.0, 1.2), "a": (1.1,), "b": (1.1,), "c": (1.3,)}
    saved = {"plain": 10, "lean 1": 8, "a": 7, "b": 9, "c": 1}
    assert dominated(times, saved, saved | {"b": 6}) == [
        "lean 1: dominated by a; counting activations alone dominated by a, b"
    ]
    assert dominated(times, saved | {"a": 8}, saved | {"a": 8}) == [
        "lean 1: not dominated; counting activations alone not dominated"
    ]
