"""Failures and mistakes around an accumulate block leave no trace."""

import copy

import numpy as np
import pytest
import torch
from accumulate_worker import (
    EXACT,
    OPTIMIZERS,
    assert_close,
    block_step,
    estimated,
    gradients,
    mean_loss,
    micro_batches,
    mixed_network,
    network,
    sgd,
    snapshot,
)
from torch import nn

from batchless.nn import standardized
from batchless.train import Accumulation, accumulate


class Counting(nn.Module):
    """A user's layer that replaces its buffer instead of changing it in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + len(x)
        return x


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


def test_every_step_puts_back_what_the_buffers_were_before_it():
    """Also a buffer that has grown in place since the last one."""
    counter = nn.Identity()
    counter.register_buffer("seen", torch.zeros(1))
    model = nn.Sequential(counter, network("bn"))
    steps = Accumulation(model, sgd(model), clip=lambda _: fail(counter.seen.zero_()))
    for size in (1, 1, 3):
        counter.seen.resize_(size).fill_(size)
        before = copy.deepcopy(dict(model.named_buffers()))
        with pytest.raises(Interrupted):
            _step_once(steps, model)
        assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
        block_step(model, sgd(model), micro_batches([(2, 2)], seed=size))
    assert not torch.equal(model[1][1].running_mean, torch.zeros(8, dtype=torch.float64))


def _step_once(steps, model):
    with steps.step() as step:
        step.backward(model(torch.randn(3, 3, 6, 6).double()).square().mean(), samples=3)


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


@pytest.mark.parametrize("count", [1.0, "1", torch.ones(1)], ids=["float", "text", "1-d"])
@pytest.mark.parametrize("argument", ["samples", "images"])
def test_a_count_that_is_none_is_refused(argument, count):
    model = nn.Linear(2, 1)
    with accumulate(model, sgd(model)) as step:
        loss = model(torch.ones(1, 2)).mean()
        with pytest.raises(ValueError, match=f"{argument} must be a whole number"):
            step.backward(loss, **{"samples": 1, argument: count})
        step.backward(loss, samples=1)


def test_a_whole_number_of_numpy_counts():
    model, other = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 2).double()
    for m, kind in ((model, np.int64), (other, int)):
        with accumulate(m, sgd(m)) as step:
            for part in (x[:1], x[1:]):
                step.backward(m(part).square().mean(), samples=kind(len(part)))
    assert_close(snapshot(model), snapshot(other), **EXACT)


def test_an_optimizer_of_other_parameters_too_is_refused():
    model, head = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="ModuleList"), accumulate(model, optimizer):
        pass
