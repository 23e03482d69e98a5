import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import batchless as bl
from batchless.train import LoopSettings, OptimizerSettings

schedules = st.builds(
    OptimizerSettings,
    learning_rate=st.floats(1e-4, 10),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(["cosine", "constant", "poly"]),
)


def rate_at(settings: OptimizerSettings, progress: float) -> float:
    return settings.learning_rate_at(progress, images_per_step=64)


@given(settings=schedules, progress=st.floats(0, 1))
def test_the_learning_rate_stays_between_zero_and_the_top(settings, progress):
    assert 0 <= rate_at(settings, progress) <= settings.learning_rate * (1 + 1e-6)


@given(settings=schedules)
def test_the_schedule_begins_and_ends_as_it_says(settings):
    top = settings.learning_rate
    assert rate_at(settings, settings.warmup) == pytest.approx(top)
    assert rate_at(settings, 1.0) == pytest.approx(top if settings.schedule == "constant" else 0, abs=1e-6 * top)
    if settings.warmup > 1e-3:
        assert rate_at(settings, 0.0) == 0
        assert rate_at(settings, settings.warmup / 2) == pytest.approx(top / 2)
        assert rate_at(settings, settings.warmup * (1 - 1e-9)) == pytest.approx(top, rel=1e-6)


@given(settings=schedules, first=st.floats(0, 1), second=st.floats(0, 1))
def test_it_rises_until_the_end_of_the_warmup_and_never_after(settings, first, second):
    first, second = sorted((first, second))
    rates = rate_at(settings, first), rate_at(settings, second)
    if second < settings.warmup:
        assert rates[0] <= rates[1]
    if first >= settings.warmup:
        assert rates[1] <= rates[0] * (1 + 1e-6)


def test_the_cosine_is_half_way_down_in_its_middle():
    settings = OptimizerSettings(learning_rate=0.4, warmup=0.2)
    assert rate_at(settings, 0.6) == pytest.approx(0.2)
    assert rate_at(settings, 0.8) == pytest.approx(0.2 * (1 + math.cos(0.75 * math.pi)))


def test_steps_fall_at_their_milestones():
    settings = OptimizerSettings(learning_rate=0.4, warmup=0.0, schedule="step", milestones=(0.25, 0.5), decay=0.5)
    rates = [rate_at(settings, progress) for progress in (0.0, 0.249, 0.25, 0.499, 0.5, 1.0)]
    assert rates == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1, 0.1])


def test_poly_is_a_power_of_what_is_left():
    settings = OptimizerSettings(learning_rate=0.4, warmup=0.2, schedule="poly", power=2.0)
    assert rate_at(settings, 0.6) == pytest.approx(0.4 * 0.5**2)


def test_the_rate_follows_the_size_of_the_step_where_a_reference_is_given():
    settings = OptimizerSettings(learning_rate=0.1, reference_images_per_step=256, warmup=0.0)
    assert settings.learning_rate_at(0.0, images_per_step=64) == pytest.approx(0.025)
    assert settings.learning_rate_at(0.0, images_per_step=1024) == pytest.approx(0.4)


def test_biases_and_gains_decay_where_it_is_said():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = OptimizerSettings(weight_decay=0.125, decay_one_dimensional=True).build(model)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.125}


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_weights_decay_and_biases_gains_and_frozen_parameters_do_not(name, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1).requires_grad_(False))
    optimizer = OptimizerSettings(name=name, learning_rate=0.25, weight_decay=0.125, momentum=0.5).build(model)
    assert type(optimizer) is kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = [model[0].weight, model[0].bias, model[1].weight, model[1].bias]
    assert {id(p) for p in trained} == set(decay)
    assert [decay[id(p)] for p in trained] == [0.125, 0, 0, 0]
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)
    if name == "sgd":
        assert all(group["momentum"] == 0.5 and group["nesterov"] for group in optimizer.param_groups)


@pytest.mark.parametrize("changes", [{"momentum": 0.0, "weight_decay": 0.0}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_the_fused_optimizer_steps_to_the_same_bits_as_sgd_one_operation_after_the_other(changes):
    torch.manual_seed(0)
    settings = OptimizerSettings(learning_rate=0.0137, decay_one_dimensional=True, **changes)
    models = [nn.Linear(37, 5), nn.Linear(37, 5)]
    models[1].load_state_dict(models[0].state_dict())
    nesterov = changes["momentum"] > 0
    plain = torch.optim.SGD(models[1].parameters(), 0.0137, nesterov=nesterov, foreach=False, **changes)
    for optimizer, model in zip((settings.build(models[0]), plain), models, strict=True):
        for step in range(1, 4):
            for parameter in model.parameters():
                parameter.grad = torch.linspace(-1, step, parameter.numel()).view_as(parameter)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_parameters_that_decay_alike_are_one_group():
    assert [len(OptimizerSettings(weight_decay=d).build(nn.Linear(2, 2)).param_groups) for d in (0.0, 0.1)] == [1, 2]


def test_sgd_without_momentum_has_no_nesterov():
    optimizer = OptimizerSettings(momentum=0.0).build(nn.Linear(2, 2))
    assert not any(group["nesterov"] for group in optimizer.param_groups)


def test_clipping_is_what_was_set():
    assert OptimizerSettings().clip() is None
    assert OptimizerSettings(adaptive_clipping=0.1).clip() == bl.AGC(0.1)
    assert OptimizerSettings(clip_norm=2.0).clip() == bl.ClipNorm(2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, r"^optimizer\.learning_rate must be above 0, got 0\.0$"),
        ({"learning_rate": float("nan")}, r"^optimizer\.learning_rate must be above 0, got nan$"),
        ({"momentum": 1.0}, r"^optimizer\.momentum must be in \[0, 1\), got 1\.0$"),
        ({"weight_decay": -1e-4}, r"^optimizer\.weight_decay must be 0 or more, got -0\.0001$"),
        ({"warmup": 1.0}, r"^optimizer\.warmup is a share of the training in \[0, 1\), got 1\.0$"),
        ({"adaptive_clipping": 0.0}, r"^optimizer\.adaptive_clipping must be above 0, or null for none; got 0\.0$"),
        ({"clip_norm": -1.0}, r"^optimizer\.clip_norm must be above 0, or null for none; got -1\.0$"),
        ({"clip_norm": 1.0, "adaptive_clipping": 0.1}, "are alternatives: set one of them"),
    ],
)
def test_wrong_optimizer_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**changes)


@pytest.mark.parametrize("name", ["images", "images_per_forward", "images_per_step", "evaluations"])
def test_wrong_loop_settings_are_named(name):
    right = LoopSettings(
        images=64, images_per_forward=2, images_per_step=8, evaluations=1, optimizer=OptimizerSettings()
    )
    with pytest.raises(ValueError, match=f"^{name} must be 1 or more, got 0$"):
        dataclasses.replace(right, **{name: 0})
    with pytest.raises(ValueError, match=r"^images_per_step=9 must be a multiple of images_per_forward=2$"):
        dataclasses.replace(right, images_per_step=9)
