"""One optimizer step over micro-batches: exact, once, and without a trace when something fails."""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accumulate_worker import (
    LAYERS,
    Branches,
    block_step,
    gradients,
    mean_loss,
    micro_batches,
    network,
    samples_in,
    snapshot,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchless.nn import EstimatedBatchNorm, Reparameterized, standardized
from batchless.train import AGC, ClipNorm, accumulate

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    # eps: a gain in front of instance normalization has a gradient so small that its rounding would show.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-5),
}
EXACT = {"rtol": 0, "atol": 1e-12}
assert_close = torch.testing.assert_close


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def full_step(model, optimizer, batches):
    """The step over the whole batch in torch's own words."""
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


SIZES = st.lists(st.integers(1, 3).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6)


@pytest.mark.parametrize("weight", LAYERS)
@pytest.mark.parametrize("act", ["gn", "ln", "in", "none"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(sizes=SIZES, counts=st.sampled_from(["int", "tensor", "mixed"]), kind=st.sampled_from(sorted(OPTIMIZERS)))
def test_equals_the_full_batch_steps(act, weight, sizes, counts, kind):
    assume(any(labelled for _, labelled in sizes))
    model, whole = network(act, weight), network(act, weight)
    optimizers = [OPTIMIZERS[kind](m.parameters()) for m in (model, whole)]
    for seed in range(3):
        batches = micro_batches(sizes, seed=seed)
        block_step(model, optimizers[0], batches, counts)
        full_step(whole, optimizers[1], batches)
    assert_close(snapshot(model), snapshot(whole), **EXACT)
    assert not torch.equal(model[0].weight, network(act, weight)[0].weight)


@pytest.mark.parametrize("counts", ["int", "tensor", "mixed"])
@pytest.mark.parametrize("act", ["gn", "ln", "none", "bcn-micro"])  # torch's InstanceNorm2d raises on them
def test_empty_micro_batches_change_nothing(act, counts):
    model, without = network(act, "ws"), network(act, "ws")
    empty, *batches = micro_batches([(0, 0), (3, 3), (2, 1)], seed=0)
    block_step(model, sgd(model), [empty, batches[0], empty, batches[1], empty], counts)
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
def test_every_layer_is_standardized_once_a_step(micro, monkeypatch):
    model = nn.Sequential(*(network("none", weight)[i] for weight in ("ws", "sws", "wn", "cwn") for i in (0, 3, 6)))
    model = nn.ModuleList([nn.Sequential(*model[i : i + 3], nn.Flatten()) for i in range(0, 12, 3)])
    calls = Counter()
    for layer in [module for module in model.modules() if isinstance(module, Reparameterized)]:
        kind = type(layer)
        original = kind.reparameterized_weight

        def counted(self, original=original):
            calls[id(self)] += 1
            return original(self)

        if not hasattr(original, "counts"):
            counted.counts = True
            monkeypatch.setattr(kind, "reparameterized_weight", counted)
    for steps in (1, 2):
        with accumulate(model, sgd(model)) as step:
            for images, _ in micro_batches([(1, 1)] * micro, seed=0):
                step.backward(sum(path(images).square().mean() for path in model), samples=1)
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


@pytest.mark.parametrize("clip", [None, AGC(0.01), ClipNorm(0.01)])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_grad_scaler_changes_nothing(enabled, clip):
    models = network("bcn-micro", "ws"), network("bcn-micro", "ws")
    optimizers = [OPTIMIZERS["sgd"](model.parameters()) for model in models]
    scaler = torch.amp.GradScaler("cpu", enabled=enabled, growth_interval=2)
    for seed in range(4):
        batches = micro_batches([(2, 2), (1, 1)], seed=seed)
        for model, optimizer, used in zip(models, optimizers, (scaler, None), strict=True):
            block_step(model, optimizer, batches, clip=clip, scaler=used)
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


# Estimates (micro-batch BCN)


def estimated(model):
    return [module for module in model.modules() if isinstance(module, EstimatedBatchNorm)]


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


# Failures


class Counting(nn.Module):
    """A user's layer that replaces its buffer instead of changing it in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + len(x)
        return x


def mixed_network():
    """All that a forward may change: running statistics, estimates of both kinds, standardized weights."""
    parts = (network("bn", "ws"), network("bcn-micro", "ws"), network("bcn-micro", "wn", update="forward"))
    return nn.Sequential(parts[0][:3], parts[1][3:6], parts[2][6:], nn.Dropout(0.0))


class Interrupted(BaseException):
    """As Ctrl-C: not an Exception."""


def fail(*_):
    raise Interrupted


class Breakable(torch.optim.SGD):
    """Fails before it steps, while told to."""

    broken = False

    def step(self, closure=None):
        if self.broken:
            fail()
        return super().step(closure)


def failing_block(model, optimizer, place, scaler):
    first, second = micro_batches([(2, 2), (3, 3)], seed=0)
    optimizer.broken = place == "step"
    with accumulate(model, optimizer, clip=fail if place == "clip" else None, scaler=scaler) as step:
        if place == "start":
            fail()
        step.backward(mean_loss(model, first), samples=2)
        if place == "forward":
            handle = model[2].register_forward_hook(fail)
            try:
                model(second[0])
            finally:
                handle.remove()
        if place == "loss":
            step.backward(mean_loss(model, second).expand(2), samples=3)
        loss = mean_loss(model, second)
        if place == "backward":
            loss.register_hook(fail)
        step.backward(loss, samples=3)
        if place == "end":
            fail()


PLACES = ["start", "forward", "loss", "backward", "end", "clip", "step"]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_anywhere_leaves_the_model_as_it_was_and_usable(place, scaled):
    model = mixed_network()
    optimizer = Breakable(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    block_step(model, optimizer, micro_batches([(2, 2), (1, 1)], seed=5), scaler=scaler)
    untouched = copy.deepcopy(model)
    before, attributes = snapshot(model), [set(vars(module)) for module in model.modules()]
    with pytest.raises((Interrupted, ValueError)):
        failing_block(model, optimizer, place, scaler)
    assert_close(snapshot(model), before, rtol=0, atol=0)
    assert all(gradient is None for gradient in gradients(model).values())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(getattr(module, "shared_weight", None) is None for module in model.modules())
    assert all(norm.step_sums is None for norm in estimated(model))

    optimizer.broken = False
    later = micro_batches([(2, 2), (4, 3)], seed=9)
    block_step(model, optimizer, later, scaler=scaler)
    block_step(untouched, sgd(untouched), later)
    assert_close(snapshot(model), snapshot(untouched), **EXACT)


def test_a_buffer_that_a_layer_replaces_is_put_back():
    model = nn.Sequential(Counting(), network("gn", "ws"))
    with pytest.raises(Interrupted):
        block_step(model, sgd(model), micro_batches([(3, 3)], seed=0), clip=fail)
    assert model[0].seen == 0


def test_a_failure_does_not_move_optimizer_state():
    model = network("gn", "ws")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    block_step(model, optimizer, micro_batches([(2, 2)], seed=0))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(Interrupted):
        block_step(model, optimizer, micro_batches([(2, 2)], seed=1), clip=fail)
    assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


# Mistakes


def any_model(kind):
    return network("bcn-micro", "ws") if kind == "ours" else network("bn")


def test_gradients_already_there_are_named_and_kept():
    model = network("gn", "ws")
    model[3].weight.grad = torch.ones_like(model[3].weight)
    with pytest.raises(ValueError, match=r"3\.weight .*zero_grad"), accumulate(model, sgd(model)):
        pass
    assert (model[3].weight.grad == 1).all()
    model.zero_grad()
    block_step(model, sgd(model), micro_batches([(2, 2)], seed=0))


@pytest.mark.parametrize("part", ["model", "child", "parent"])
@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_a_block_inside_a_block_is_refused_and_the_outer_one_goes_on(kind, part):
    model, other = any_model(kind), any_model(kind)
    nested = {"model": model, "child": model[-1], "parent": nn.Sequential(model)}[part]
    first, second = micro_batches([(2, 2), (3, 3)], seed=0)
    with accumulate(model, sgd(model)) as step:
        step.backward(mean_loss(model, first), samples=2)
        kept = gradients(model)
        for parameter in model.parameters():
            parameter.grad = None  # only then is it the nesting that is refused
        with pytest.raises(ValueError, match="already inside"), accumulate(nested, sgd(model)):
            pass
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
        step.backward(mean_loss(model, second), samples=3)
    block_step(other, sgd(other), [first, second])
    assert_close(snapshot(model), snapshot(other), **EXACT)


def test_two_models_may_be_in_blocks_at_once():
    models, others = (
        (network("gn", "ws"), network("gn", "ws", seed=1)),
        (network("gn", "ws"), network("gn", "ws", seed=1)),
    )
    batches = micro_batches([(2, 2), (1, 1)], seed=0)
    with accumulate(models[0], sgd(models[0])) as one, accumulate(models[1], sgd(models[1])) as two:
        for batch in batches:
            for step, model in ((one, models[0]), (two, models[1])):
                step.backward(mean_loss(model, batch), samples=len(batch[0]))
    for model, other in zip(models, others, strict=True):
        block_step(other, sgd(other), batches)
        assert_close(snapshot(model), snapshot(other), **EXACT)


def test_a_block_inside_a_standardized_block_is_refused():
    model = network("gn", "ws")
    with standardized(model), pytest.raises(ValueError, match="standardized"), accumulate(model, sgd(model)):
        pass


def test_a_model_in_data_parallel_is_refused():
    model = nn.DataParallel(network("gn"))
    with pytest.raises(ValueError, match=r"DataParallel.*model\.module"), accumulate(model, sgd(model)):
        pass


@pytest.mark.parametrize("counts", ["int", "tensor"])
@pytest.mark.parametrize("sizes", [[], [(2, 0)], [(2, 0), (1, 0)]])
@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_no_sample_in_the_block_is_refused(kind, sizes, counts):
    model = any_model(kind)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"step\.backward"):
        block_step(model, sgd(model), micro_batches(sizes, seed=0), counts)
    assert_close(snapshot(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "samples", "words"),
    [
        (lambda x: x.mean((1, 2, 3)), 2, r"0-d.*\(2,\)"),
        (lambda x: x.mean().reshape(1), 2, r"0-d.*\(1,\)"),
        (lambda x: x.mean(), -1, "0 or more.*-1"),
    ],
)
def test_a_wrong_loss_or_count_is_refused_and_counts_nothing(loss, samples, words):
    model, other = network("gn")[0], network("gn")[0]
    images = micro_batches([(2, 2)], seed=0)[0][0]
    with accumulate(model, sgd(model)) as step:
        with pytest.raises(ValueError, match=words):
            step.backward(loss(model(images)), samples=samples)
        step.backward(model(images).mean(), samples=2)
    other(images).mean().backward()
    sgd(other).step()
    assert_close(snapshot(model), snapshot(other), **EXACT)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_has_ended_is_refused(fails):
    model = nn.Linear(2, 1)
    try:
        with accumulate(model, sgd(model)) as step:
            step.backward(model(torch.ones(1, 2)).mean(), samples=1)
            if fails:
                fail()
    except Interrupted:
        pass
    with pytest.raises(ValueError, match="ended"):
        step.backward(model(torch.ones(1, 2)).mean(), samples=1)
    assert model.weight.grad is None


def test_an_unknown_process_group_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="'world'"), accumulate(model, sgd(model), process_group="wrold") as step:
        step.backward(model(torch.ones(1, 2)).mean(), samples=1)


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
