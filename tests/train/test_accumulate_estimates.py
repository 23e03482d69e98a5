"""Estimates inside an accumulate block: read only, moved once, exactly by what the step saw."""

import pytest
import torch
from accumulate_worker import (
    EXACT,
    OPTIMIZERS,
    SIZES,
    assert_close,
    block_step,
    estimated,
    mean_loss,
    micro_batches,
    network,
    samples_in,
    sgd,
    snapshot,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchless.nn import EstimatedBatchNorm
from batchless.train import accumulate


def seen_by(model):
    """What every estimating layer is given, in order, with its estimates at that time."""
    inputs = {layer: [] for layer in estimated(model)}
    for layer, seen in inputs.items():
        layer.register_forward_pre_hook(
            lambda layer, args, seen=seen: seen.append((args[0].detach().clone(), layer.running_mean.clone()))
        )
    return inputs


def moved(start, inputs, *, images, moves, memory=200.0, warmup=True):
    """The estimates after one move, from all inputs of a step at once, in float64."""
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x, _ in inputs], 1)
    rate = max(1 - (1 - 1 / memory) ** images, 1 / moves if warmup else 0)
    mean = (1 - rate) * start[0] + rate * values.mean(1)
    var = (1 - rate) * start[1] + rate * (values - start[0][:, None]).square().mean(1)
    return mean, var


@pytest.mark.parametrize("counts", ["int", "tensor"])
@pytest.mark.parametrize("warmup", [True, False])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(sizes=SIZES, per_image=st.integers(1, 3))
def test_estimates_move_once_by_the_moments_of_all_micro_batches(warmup, counts, sizes, per_image):
    """`images` counts for the rate, whatever the number of samples; an ignored image is an image."""
    assume(any(labelled for _, labelled in sizes))
    model = network("bcn-micro", "ws")
    for norm in estimated(model):
        norm.warmup = warmup
        norm.memory.fill_(30.0)
    inputs, optimizer = seen_by(model), sgd(model)
    images = per_image * sum(size for size, _ in sizes)
    for moves in range(1, 4):
        starts = {layer: (layer.running_mean.clone(), layer.running_var.clone()) for layer in inputs}
        with accumulate(model, optimizer) as step:
            for batch in micro_batches(sizes, seed=moves):
                step.backward(
                    mean_loss(model, batch), samples=samples_in(batch, counts), images=per_image * len(batch[0])
                )
        for layer, seen in inputs.items():
            assert all(torch.equal(mean, starts[layer][0]) for _, mean in seen)
            mean, var = moved(starts[layer], seen, images=images, moves=moves, memory=30.0, warmup=warmup)
            assert_close(layer.running_mean, mean, **EXACT)
            assert_close(layer.running_var, var, **EXACT)
            assert layer.moves == moves
            seen.clear()


def test_images_are_the_samples_unless_given():
    models = network("bcn-micro"), network("bcn-micro")
    batches = micro_batches([(3, 3), (1, 1)], seed=0)
    for model, options in zip(models, ({}, {"images": torch.tensor(2)}), strict=True):
        for norm in estimated(model):
            norm.warmup = False
        with accumulate(model, sgd(model)) as step:
            for batch in batches:
                step.backward(mean_loss(model, batch), samples=2, **options)
    assert_close(snapshot(models[0]), snapshot(models[1]), **EXACT)
    assert models[0][1].batch_norm.running_mean.abs().max() > 0


def test_a_layer_that_runs_several_times_and_one_that_does_not_run():
    torch.manual_seed(0)
    model = nn.ModuleList([EstimatedBatchNorm(4), EstimatedBatchNorm(4), EstimatedBatchNorm(4)]).double()
    model[2].eval()
    inputs, start = seen_by(model), (torch.zeros(4).double(), torch.ones(4).double())
    with accumulate(model, sgd(model)) as step:
        for size in (7, 3, 5):
            levels = [torch.randn(2, 4, size, size + 1).double() + 1 for _ in range(3)]
            step.backward(sum(model[0](x).square().mean() + model[2](x).square().mean() for x in levels), samples=2)
    assert len(inputs[model[0]]) == 9
    mean, var = moved(start, inputs[model[0]], images=6, moves=1)
    assert_close(model[0].running_mean, mean, **EXACT)
    assert_close(model[0].running_var, var, **EXACT)
    for still in (model[1], model[2]):
        assert_close((still.running_mean, still.running_var), start, **EXACT)
        assert still.moves == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_neither_gradients_nor_estimates(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        def forward(self, images):
            return self.parts[6:](checkpoint(self.parts[:6], images.requires_grad_(), use_reentrant=reentrant))

    plain = network("bcn-micro", "ws")
    model = Checkpointed(network("bcn-micro", "ws"))
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (plain, model)]
    for seed in range(3):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            block_step(m, optimizer, micro_batches([(2, 2), (1, 1), (3, 2)], seed=seed))
    assert_close(snapshot(model.parts), snapshot(plain), **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_shared_layer_that_is_recomputed_in_one_of_its_calls_weighs_all_alike(reentrant):
    torch.manual_seed(0)
    model, start = nn.ModuleList([EstimatedBatchNorm(4)]).double(), (torch.zeros(4).double(), torch.ones(4).double())
    calls = [torch.randn(2, 4, 3, 3).double() + shift for shift in (0, 5)]
    with accumulate(model, sgd(model)) as step:
        recomputed = checkpoint(model[0], calls[0].requires_grad_(), use_reentrant=reentrant)
        step.backward((recomputed + model[0](calls[1])).square().mean(), samples=2)
    mean, var = moved(start, [(x.detach(), None) for x in calls], images=2, moves=1)
    assert_close((model[0].running_mean, model[0].running_var), (mean, var), **EXACT)


def test_estimates_that_update_in_the_forward_move_at_each():
    model = network("bcn-micro", "ws", update="forward")
    inputs = seen_by(model)
    starts = {layer: (layer.running_mean.clone(), layer.running_var.clone()) for layer in inputs}
    block_step(model, sgd(model), micro_batches([(3, 3), (1, 0), (2, 2)], seed=0))
    for layer, seen in inputs.items():
        estimates = starts[layer]
        for moves, one in enumerate(seen, start=1):
            estimates = moved(estimates, [one], images=len(one[0]), moves=moves)
        assert_close((layer.running_mean, layer.running_var), estimates, **EXACT)
        assert layer.moves == 3


def test_a_channel_that_overflowed_stays_as_it_is():
    model = EstimatedBatchNorm(2, affine=True)
    x = torch.randn(4, 2, 3, 3)
    x[0, 0, 0, 0] = torch.inf
    with accumulate(model, sgd(model, lr=0.0)) as step:
        step.backward(model(x).nan_to_num().mean(), samples=4)
    assert model.running_mean[0] == 0
    assert model.running_var[0] == 1
    assert_close(model.running_mean[1], x[:, 1].mean())
    assert model.moves == 1
