"""One optimizer step over micro-batches: exact, once, and without a trace when something fails."""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accumulate_worker import (
    EXACT,
    LAYERS,
    OPTIMIZERS,
    SIZES,
    Branches,
    assert_close,
    block_step,
    gradients,
    mean_loss,
    micro_batches,
    mixed_network,
    network,
    samples_in,
    sgd,
    snapshot,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from batchless.nn import Reparameterized
from batchless.train import AGC, Accumulation, ClipNorm, accumulate


def full_step(model, optimizer, batches):
    """The step over the whole batch in torch's own words."""
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("weight", LAYERS)
@pytest.mark.parametrize("act", ["gn", "ln", "in", "none"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=SIZES,
    counts=st.sampled_from(["int", "tensor", "mixed"]),
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    summed=st.booleans(),
)
def test_equals_the_full_batch_steps(act, weight, sizes, counts, kind, summed):
    assume(any(labelled for _, labelled in sizes))
    model, whole = network(act, weight), network(act, weight)
    optimizers = [OPTIMIZERS[kind](m.parameters()) for m in (model, whole)]
    for seed in range(3):
        batches = micro_batches(sizes, seed=seed)
        block_step(model, optimizers[0], batches, counts, summed=summed)
        full_step(whole, optimizers[1], batches)
    assert_close(snapshot(model), snapshot(whole), **EXACT)
    assert not torch.equal(model[0].weight, network(act, weight)[0].weight)


@pytest.mark.parametrize("weight", LAYERS)
@pytest.mark.parametrize("act", ["bn", "bcn-micro", "none"])
def test_many_steps_are_as_many_blocks_to_the_bit(act, weight):
    """Also after a step that failed, and where a forward has put another tensor in the place of a buffer."""
    model, other = network(act, weight), network(act, weight)
    optimizer, other_optimizer = sgd(model), sgd(other)
    steps = Accumulation(model, optimizer, clip=AGC(0.1))
    for seed in range(4):
        batches = micro_batches([(3, 3), (2, 2), (4, 4)], seed=seed)
        with pytest.raises(ValueError, match="no process called"), steps.step():
            pass
        for context, own in ((steps.step(), model), (accumulate(other, other_optimizer, clip=AGC(0.1)), other)):
            with context as step:
                for images, targets in batches:
                    step.backward(F.cross_entropy(own(images), targets), samples=len(images))
        for owner in (model, other):
            for module in owner.modules():
                module._buffers.update(
                    {name: kept.clone() for name, kept in module._buffers.items() if kept is not None}
                )
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("counts", ["int", "tensor", "mixed"])
@pytest.mark.parametrize("act", ["gn", "ln", "none", "bcn-micro"])  # torch's InstanceNorm2d raises on them
def test_empty_micro_batches_change_nothing(act, counts, summed):
    model, without = network(act, "ws"), network(act, "ws")
    empty, *batches = micro_batches([(0, 0), (3, 3), (2, 1)], seed=0)
    block_step(model, sgd(model), [empty, batches[0], empty, batches[1], empty], counts, summed=summed)
    block_step(without, sgd(without), batches)
    assert_close(snapshot(model), snapshot(without), **EXACT)


@pytest.mark.parametrize("tensor_counts", [False, True])
def test_pixels_weigh_alike_and_ignored_micro_batches_are_zero(tensor_counts):
    """2 labelled pixels, 72 and none: far from equal shares."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS["ws"][0](3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = model.double()
    whole = copy.deepcopy(model)
    images, labels = torch.randn(4, 3, 6, 6).double(), torch.randint(0, 4, (4, 6, 6))
    labels[0].view(-1)[2:] = -100
    labels[3] = -100
    with accumulate(model, sgd(model)) as step:
        for part in ([0], [1, 2], [3]):
            count = (labels[part] >= 0).sum()
            loss = F.cross_entropy(model(images[part]), labels[part], reduction="sum") / count.clamp_min(1)
            step.backward(loss, samples=count if tensor_counts else int(count), images=len(part))
    full_step(whole, sgd(whole), [(images, labels)])
    assert_close(snapshot(model), snapshot(whole), **EXACT)


@pytest.mark.parametrize("counts", [int, torch.tensor])
def test_many_samples_do_not_overflow_in_half_precision(counts):
    model, seen = nn.Linear(1, 1, bias=False).half(), []
    with accumulate(model, sgd(model, lr=0.0), clip=lambda _: seen.append(model.weight.grad.item())) as step:
        for slope, samples in ((3e4, 500), (1e4, 250)):
            step.backward((model(torch.ones(1, 1).half()) * slope).sum(), samples=counts(samples))
    assert seen == [pytest.approx((3e4 * 500 + 1e4 * 250) / 750, rel=1e-3)]


def test_the_mean_of_means_would_be_another_step():
    """The data of these tests tell an unweighted step apart."""
    batches = micro_batches([(3, 3), (1, 1)], seed=0)
    model, unweighted = network("gn"), network("gn")
    block_step(model, sgd(model), batches)
    (sum(mean_loss(unweighted, batch) for batch in batches) / 2).backward()
    sgd(unweighted).step()
    assert (model[0].weight - unweighted[0].weight).abs().max() > 1e-4


# What the optimizer and the clip function see


class Watched(torch.optim.SGD):
    """Notes the order of things and the gradients it steps with."""

    def __init__(self, model, events):
        super().__init__(model.parameters(), lr=0.1)
        self.model, self.events = model, events

    def step(self, closure=None):
        self.events.append(("step", gradients(self.model)))
        return super().step(closure)


@pytest.mark.parametrize("scaled", [False, True])
def test_clip_runs_once_on_the_mean_gradient_of_raw_weights_before_the_step(scaled):
    model, whole, events = network("gn", "ws"), network("gn", "ws"), []
    batches = micro_batches([(3, 2), (1, 1), (2, 2)], seed=0)

    def clip(clipped):
        assert clipped is model
        assert all(layer.shared_weight is None for layer in model.modules() if isinstance(layer, Reparameterized))
        events.append(("clip", gradients(model)))
        for parameter in model.parameters():
            parameter.grad *= 0.5

    scaler = torch.amp.GradScaler("cpu") if scaled else None
    block_step(model, Watched(model, events), batches, clip=clip, scaler=scaler)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    F.cross_entropy(whole(images), targets).backward()
    expected = gradients(whole)
    assert [name for name, _ in events] == ["clip", "step"]
    assert_close(events[0][1], expected, **EXACT)
    assert_close(events[1][1], {name: gradient / 2 for name, gradient in expected.items()}, **EXACT)
    assert all(gradient is None for gradient in gradients(model).values())


@pytest.mark.parametrize("counts", ["int", "tensor"])
def test_unused_layers_have_no_gradient_and_do_not_decay(counts):
    model, events = Branches(), []
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    with accumulate(model, optimizer, clip=lambda _: events.append(gradients(model))) as step:
        for batch in micro_batches([(2, 2), (1, 1)], seed=0):
            step.backward(model(batch[0], "first"), samples=samples_in(batch, counts))
    (seen,) = events
    unused = {name for name, gradient in seen.items() if gradient is None}
    assert unused == {name for name in before if name.startswith(("heads.second", "heads.neither"))}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before) - unused


@pytest.mark.parametrize("micro", [1, 4])
def test_every_layer_is_standardized_once_a_step(micro, computed_weights):
    model = nn.Sequential(*(network("none", weight)[i] for weight in ("ws", "sws", "wn", "cwn") for i in (0, 3, 6)))
    model = nn.ModuleList([nn.Sequential(*model[i : i + 3], nn.Flatten()) for i in range(0, 12, 3)])
    for steps in (1, 2):
        with accumulate(model, sgd(model)) as step:
            for images, _ in micro_batches([(1, 1)] * micro, seed=0):
                step.backward(sum(path(images).square().mean() for path in model), samples=1)
        calls = Counter(computed_weights)
        assert len(calls) == 12
        assert set(calls.values()) == {steps}


def test_a_tied_and_a_frozen_weight_are_exact():
    def build():
        model = network("none", "ws")
        model.append(nn.Linear(5, 5).double())
        model[0].weight.requires_grad_(False)
        model.insert(1, LAYERS["ws"][0](8, 8, 3, padding=1).double())
        model.insert(2, LAYERS["sws"][0](8, 8, 3, padding=1).double())
        model[2].weight = model[1].weight
        torch.manual_seed(3)
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[-1].weight)
        for layer in (model[1], model[2], model[-1]):
            nn.init.zeros_(layer.bias)
        return model

    model, whole = build(), build()
    batches = micro_batches([(2, 2), (1, 1)], seed=0)
    block_step(model, sgd(model), batches)
    full_step(whole, sgd(whole), batches)
    assert_close(snapshot(model), snapshot(whole), **EXACT)
    assert torch.equal(model[0].weight, build()[0].weight)
    assert not torch.equal(model[1].weight, build()[1].weight)


# Loss scaling


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("clip", [None, AGC(0.01), ClipNorm(0.01)])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_grad_scaler_changes_nothing(enabled, clip, summed):
    models = network("bcn-micro", "ws"), network("bcn-micro", "ws")
    optimizers = [OPTIMIZERS["sgd"](model.parameters()) for model in models]
    scaler = torch.amp.GradScaler("cpu", enabled=enabled, growth_interval=2)
    for seed in range(4):
        batches = micro_batches([(2, 2), (1, 1)], seed=seed)
        for model, optimizer, used in zip(models, optimizers, (scaler, None), strict=True):
            block_step(model, optimizer, batches, clip=clip, scaler=used, summed=summed)
    assert_close(snapshot(models[0]), snapshot(models[1]), **EXACT)
    assert scaler.get_scale() == (4 * 65536.0 if enabled else 1.0)


def test_infinite_gradients_skip_the_step():
    model, scaler = network("gn", "ws"), torch.amp.GradScaler("cpu")
    before = snapshot(model)
    optimizer = sgd(model)
    first, second = micro_batches([(2, 2), (1, 1)], seed=0)
    with accumulate(model, optimizer, clip=ClipNorm(1.0), scaler=scaler) as step:
        step.backward(mean_loss(model, first), samples=2)
        step.backward(mean_loss(model, second) * float("inf"), samples=1)
    assert_close(snapshot(model), before, rtol=0, atol=0)
    assert scaler.get_scale() == 32768
    block_step(model, optimizer, [first, second], scaler=scaler)
    plain = network("gn", "ws")
    block_step(plain, sgd(plain), [first, second])
    assert_close(snapshot(model), snapshot(plain), **EXACT)


# Compiled, without the block, copied


@pytest.mark.parametrize("clip", [None, AGC(0.01)])
def test_a_compiled_model_gives_the_same_steps_and_is_compiled_once(clip):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, model = (network("bcn-micro", "ws") for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (plain, model)]
    frames = []
    for seed in range(5):
        batches = micro_batches([(2, 2), (2, 1), (2, 2)], seed=seed)
        with torch._dynamo.config.patch(error_on_recompile=seed >= 2):
            block_step(compiled, optimizers[1], batches, clip=clip)
        block_step(plain, optimizers[0], batches, clip=clip)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames == [1] * 5
    assert_close(snapshot(model), snapshot(plain), **EXACT)


def formula(layer):
    """The effective weight of a dense layer from its definition, by plain autograd."""
    rows, name = layer.weight.flatten(1), type(layer).__name__
    centred = rows - rows.mean(1, keepdim=True)
    gain = getattr(layer, "gain", None)
    if name.startswith("WS"):
        rows = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    elif name.startswith("Scaled"):
        rows = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() / rows.shape[1] ** 0.5
        rows = rows * (1.7 * gain)[:, None]
    else:
        directions = centred if name.startswith("C") else rows
        rows = directions / directions.square().sum(1, keepdim=True).sqrt() * gain[:, None]
    return rows.view_as(layer.weight)


@pytest.mark.parametrize("weight", ["ws", "sws", "wn", "cwn"])
@pytest.mark.parametrize("block", [False, True])
def test_with_and_without_the_block_a_step_follows_the_formula(weight, block):
    def build():
        torch.manual_seed(2)
        return nn.Sequential(LAYERS[weight][0](3, 4, 3), nn.Flatten(), LAYERS[weight][2](64, 5)).double()

    model, other = build(), build()
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, other)]
    for seed in range(3):
        images, targets = micro_batches([(4, 4)], seed=seed)[0]
        if block:
            block_step(model, optimizers[0], [(images[:1], targets[:1]), (images[1:], targets[1:])])
        else:
            full_step(model, optimizers[0], [(images, targets)])
        features = F.conv2d(images, formula(other[0]), other[0].bias).flatten(1)
        F.cross_entropy(F.linear(features, formula(other[2]), other[2].bias), targets).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert_close(snapshot(model), snapshot(other), **EXACT)


@pytest.mark.parametrize("weight", LAYERS)
@pytest.mark.parametrize("act", ["gn", "none", "bcn-micro"])
def test_without_the_block_every_parameter_trains(act, weight):
    model, batches = network(act, weight), micro_batches([(6, 6)], seed=0)
    optimizer, before = sgd(model), snapshot(model)
    with torch.no_grad():
        first = mean_loss(model.train(), batches[0])
    for _ in range(20):
        full_step(model, optimizer, batches)
    assert mean_loss(model, batches[0]) < 0.9 * first
    assert not [name for name, _ in model.named_parameters() if torch.equal(before[name], model.state_dict()[name])]


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save])
def test_a_copy_made_after_a_block_trains_on_as_the_model_does(copied, compiled):
    model = mixed_network()
    used = torch.compile(model, backend="eager") if compiled else model
    block_step(used, sgd(model), micro_batches([(2, 2), (2, 2)], seed=0))
    double = copied(model)
    for m in (model, double):
        block_step(m, sgd(m), micro_batches([(2, 2), (3, 3)], seed=1))
    assert_close(snapshot(double), snapshot(model), rtol=0, atol=0)
    images = micro_batches([(2, 2)], seed=2)[0][0]
    assert torch.equal(double.eval()(images), model.eval()(images))
