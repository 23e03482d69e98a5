"""The moving average of parameters, by its formula."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchless.train.average import ParameterAverage


def changed(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))


@given(st.lists(st.integers(1, 64), min_size=1, max_size=6), st.sampled_from([1.0, 10.0, 1000.0]))
def test_it_is_the_formula(steps, memory):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double()
    average = ParameterAverage(model, memory=memory)
    expected: list[torch.Tensor] = []
    for number, images in enumerate(steps, start=1):
        changed(model, number)
        average.update(model, images=images)
        rate = max(1 - (1 - 1 / memory) ** images, 1 / number)
        values = [p.detach().clone() for p in model.parameters()]
        expected = (
            values if not expected else [(1 - rate) * e + rate * v for e, v in zip(expected, values, strict=True)]
        )
    for own, value in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-12, atol=1e-12)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)


def test_the_images_of_a_memory_weigh_the_same_however_they_are_split_into_steps():
    """After the warm-up: one step of 32 images forgets as much as 32 steps of one."""
    models = [nn.Linear(2, 2).double() for _ in range(2)]
    averages = []
    for model, size in zip(models, (1, 32), strict=True):
        changed(model, 0)
        average = ParameterAverage(model, memory=50.0)
        average.steps = 10**9
        changed(model, 1)
        for _ in range(32 // size):
            average.update(model, images=size)
        averages.append(average.model.weight)
    torch.testing.assert_close(*averages, rtol=1e-9, atol=1e-9)


def test_the_average_is_apart_from_the_model_and_has_no_gradient():
    model = nn.Linear(2, 2)
    average = ParameterAverage(model, memory=50.0)
    average.update(model, images=1)
    before = average.model.weight.clone()
    changed(model, 3)
    assert torch.equal(average.model.weight, before)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert not average.model.training
