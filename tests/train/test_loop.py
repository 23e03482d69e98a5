import copy
import json
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tiny_training import IMAGES_PER_EPOCH, TinyData, settings, tiny_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from batchless.nn import WSConv2d
from batchless.runs import RunFolder, load_checkpoint, load_model_state, read_run
from batchless.tasks import Classify
from batchless.train import OptimizerSettings, evaluate, loop, train


@pytest.fixture
def new_run(tmp_path):
    """Make another run folder."""
    made: list[RunFolder] = []

    def make() -> RunFolder:
        made.append(RunFolder.create(tmp_path / str(len(made)), config={}, seed=0))
        return made[-1]

    yield make
    for run in made:
        run.release()


@pytest.fixture
def log_every_step(monkeypatch):
    monkeypatch.setattr(loop, "_LOG_EVERY_SECONDS", -1)


def records(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def learning_rates():
    """Every optimizer step's learning rate, in order."""
    rates: list[float] = []

    def note(optimizer, args, kwargs):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        rates.append(rate)

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield rates
    finally:
        handle.remove()


def assert_same(first: nn.Module, second: nn.Module, *, tolerance: float) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=tolerance, atol=tolerance, msg=name)


def test_the_same_start_gives_the_same_bits(new_run):
    models = [tiny_model(dtype=torch.float32) for _ in range(2)]
    before = copy.deepcopy(models[0])
    for model in models:
        train(model, Classify(), TinyData(torch.float32), settings(), new_run())
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    assert not torch.equal(models[0][0].weight, before[0].weight)


@pytest.mark.parametrize("normalizer", ["gn+ws", "bcn-micro+ws", "none+sws", "ln"])
def test_images_per_forward_changes_nothing_for_a_batch_independent_normalizer(normalizer, new_run):
    """Epochs of 10 are no multiple of the step, nor is the budget: the ragged steps must be the same ones too."""
    trained = []
    for images_per_forward in (1, 2, 4):
        model = tiny_model(normalizer)
        summary = train(model, Classify(), TinyData(), settings(images_per_forward=images_per_forward), new_run())
        trained.append((model, summary))
    for model, summary in trained[1:]:
        assert_same(model, trained[0][0], tolerance=1e-10)
        assert summary["test_accuracy"] == trained[0][1]["test_accuracy"]
        assert summary["test_loss"] == pytest.approx(trained[0][1]["test_loss"], abs=1e-6)  # scores are float32 there


def test_batch_statistics_do_depend_on_it(new_run):
    """The test above proves nothing if every normalizer passes."""
    models = [tiny_model("bn") for _ in range(2)]
    for model, images_per_forward in zip(models, (2, 4), strict=True):
        train(model, Classify(), TinyData(), settings(images_per_forward=images_per_forward), new_run())
    assert not torch.allclose(models[0][0].weight, models[1][0].weight, rtol=1e-3)


@pytest.mark.parametrize("images", [1, 7, 10, 20, 27, 31])
@pytest.mark.parametrize("images_per_forward", [1, 4])
def test_the_budget_of_images_is_met_exactly(images, images_per_forward, new_run):
    model, data, run = tiny_model(), TinyData(), new_run()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0]) if module.training else None)
    budget = settings(images=images, images_per_forward=images_per_forward)
    summary = train(model, Classify(), data, budget, run)
    epochs = [min(IMAGES_PER_EPOCH, images - start) for start in range(0, images, IMAGES_PER_EPOCH)]
    assert data.asked == list(enumerate(epochs))
    expected = torch.cat([data.images[data.order(epoch)[:count]] for epoch, count in enumerate(epochs)])
    assert torch.equal(torch.cat(seen), expected)
    assert max(map(len, seen)) <= images_per_forward
    assert summary["images"] == images == load_checkpoint(run.path / "checkpoints" / "last.pt")["images"]


@pytest.mark.parametrize("images_per_forward", [1, 4])
def test_no_step_crosses_epochs(images_per_forward, new_run):
    with learning_rates() as rates:
        train(tiny_model(), Classify(), TinyData(), settings(images_per_forward=images_per_forward), new_run())
    assert len(rates) == 3 + 3 + 2


@pytest.mark.parametrize("images_per_step", [2, 4])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_is_a_function_of_the_images_seen(images_per_step, schedule, new_run):
    optimizer = OptimizerSettings(learning_rate=0.3, warmup=0.25, schedule=schedule)
    with learning_rates() as rates:
        train(
            tiny_model(),
            Classify(),
            TinyData(),
            settings(images=40, images_per_step=images_per_step, optimizer=optimizer),
            new_run(),
        )

    def rate(images: float) -> float:
        if images < 10:  # a quarter of the budget
            return 0.3 * images / 10
        return 0.3 if schedule == "constant" else 0.15 * (1 + math.cos(math.pi * (images - 10) / 30))

    starts = [(epoch, step) for epoch in range(0, 40, 10) for step in range(0, 10, images_per_step)]
    middles = [epoch + (step + min(step + images_per_step, 10)) / 2 for epoch, step in starts]
    assert rates == pytest.approx([rate(middle) for middle in middles], abs=1e-6)
    assert rates[0] > 0


def test_evaluation_changes_nothing_and_restores_the_modes():
    model = tiny_model("bn+ws")
    model[1].eval()  # someone froze this one
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    evaluate(model, Classify(), TinyData())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_restores_the_modes_after_an_error():
    class Failing(TinyData):
        def test(self, part):
            yield next(super().test(part))
            raise ValueError("an unreadable image")

    model = tiny_model()
    with pytest.raises(ValueError, match="an unreadable image"):
        evaluate(model, Classify(), Failing())
    assert all(module.training for module in model.modules())
    assert all(m.shared_weight is None for m in model.modules() if isinstance(m, WSConv2d))


def test_evaluation_standardizes_each_weight_once(monkeypatch):
    model, count = tiny_model(), 0
    compute = WSConv2d.reparameterized_weight

    def counted(self):
        nonlocal count
        count += 1
        return compute(self)

    monkeypatch.setattr(WSConv2d, "reparameterized_weight", counted)
    evaluate(model, Classify(), TinyData())
    assert count == 2  # two layers, three batches
    model(torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    assert count == 4  # so the count does count


def test_evaluation_uses_the_evaluation_mode_and_every_image_once():
    model, data = tiny_model("bn"), TinyData()
    with torch.no_grad():
        scores = copy.deepcopy(model).eval()(data.images[IMAGES_PER_EPOCH:])
    labels = data.labels[IMAGES_PER_EPOCH:]
    figures = evaluate(model, Classify(), data).compute()
    assert figures["accuracy"] == pytest.approx((scores.argmax(1) == labels).double().mean().item())
    assert figures["loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-6)


@pytest.mark.usefixtures("log_every_step")
def test_the_metrics_are_those_documented(new_run):
    model, data, run = tiny_model(), TinyData(), new_run()
    first, labels = data.images[data.order(0)[:4]], data.labels[data.order(0)[:4]]
    with torch.no_grad():
        first_loss = F.cross_entropy(copy.deepcopy(model)(first), labels).item()
    summary = train(model, Classify(), data, settings(evaluations=3), run)
    found = records(run)
    steps = [record for record in found if record["kind"] == "train"]
    tests = [record for record in found if record["kind"] == "test"]
    assert len(steps) + len(tests) == len(found)
    assert all(record.keys() == {"kind", "images", "loss"} for record in steps)
    assert all(record.keys() == {"kind", "images", "accuracy", "loss"} for record in tests)
    assert [record["images"] for record in steps] == [4, 8, 10, 14, 18, 20, 24, 27]
    assert [record["images"] for record in tests] == [10, 18, 27]  # the first steps at or after 9, 18 and 27 images
    assert steps[0]["loss"] == pytest.approx(first_loss)
    assert {name: summary[f"test_{name}"] for name in ("accuracy", "loss")} == {
        name: tests[-1][name] for name in ("accuracy", "loss")
    }
    assert summary["images_per_second"] == pytest.approx(27 / summary["seconds"])
    assert read_run(run.path).summary == summary


@pytest.mark.usefixtures("log_every_step")
def test_progress_is_shown_with_the_latest_figures(new_run):
    shown: list[tuple[int, dict]] = []

    def on_progress(images, figures):
        shown.append((images, dict(figures)))

    summary = train(tiny_model(), Classify(), TinyData(), settings(), new_run(), on_progress)
    assert [images for images, _ in shown] == sorted(images for images, _ in shown)
    assert shown[0][0] == 4
    assert shown[0][1].keys() == {"loss", "images/s"}
    assert shown[-1][0] == 27
    assert shown[-1][1]["test_accuracy"] == summary["test_accuracy"]


def test_more_evaluations_than_steps_are_one_for_each_step(new_run):
    run = new_run()
    train(tiny_model(), Classify(), TinyData(), settings(evaluations=1000), run)
    assert [record["images"] for record in records(run) if record["kind"] == "test"] == [4, 8, 10, 14, 18, 20, 24, 27]


class TurnsInvalid(Classify):
    """From a number of training images on, the loss is NaN, or finite with a gradient that is not."""

    def __init__(self, after: int, value: str) -> None:
        super().__init__()
        self.left, self.value = after, value

    def loss(self, model, batch):
        total, count = super().loss(model, batch)
        self.left -= count
        if self.left >= 0:
            return total, count
        if self.value == "gradient":
            return total + (total - total.detach()).abs().sqrt(), count  # 0, but with the gradient of sqrt at 0
        return total * float(self.value), count


@pytest.mark.parametrize("value", ["nan", "inf", "gradient"])
def test_an_invalid_loss_stops_the_run_and_leaves_the_earlier_checkpoint(value, new_run):
    model, run = tiny_model(), new_run()
    with pytest.raises(
        ValueError, match=r"became NaN or infinite within 18 images: lower optimizer\.learning_rate"
    ) as e:
        train(model, TurnsInvalid(12, value), TinyData(), settings(evaluations=3), run)
    assert "\n" not in str(e.value)
    checkpoint = load_checkpoint(run.path / "checkpoints" / "last.pt")
    assert checkpoint["images"] == 10
    restored = tiny_model(seed=1)
    load_model_state(restored, checkpoint["model"], source="last.pt")
    assert all(value.isfinite().all() for value in restored.state_dict().values())
    figures = evaluate(restored, Classify(), TinyData()).compute()
    (test,) = [record for record in records(run) if record["kind"] == "test"]
    assert figures == {name: test[name] for name in ("accuracy", "loss")}
    assert read_run(run.path).summary is None


def test_an_invalid_weight_never_reaches_a_checkpoint(new_run):
    """The last step's gradient is invalid: every loss was finite."""
    run = new_run()
    task = TurnsInvalid(8, "gradient")
    with pytest.raises(ValueError, match=r"^0\.weight became NaN or infinite within 10 images: lower optimizer"):
        train(tiny_model(), task, TinyData(), settings(images=10, evaluations=2), run)
    assert load_checkpoint(run.path / "checkpoints" / "last.pt")["images"] == 8


@pytest.mark.usefixtures("log_every_step")
def test_an_invalid_loss_is_noticed_when_it_is_logged(new_run):
    run = new_run()
    with pytest.raises(ValueError, match="the loss became NaN or infinite within 4 images"):
        train(tiny_model(), TurnsInvalid(0, "nan"), TinyData(), settings(evaluations=1), run)
    assert not (run.path / "checkpoints").exists()


def test_the_checkpoint_loads_into_a_new_model_with_the_same_accuracy(new_run):
    run = new_run()
    summary = train(tiny_model("bcn-micro+ws"), Classify(), TinyData(), settings(), run)
    checkpoint = load_checkpoint(run.path / "checkpoints" / "last.pt")
    model = tiny_model("bcn-micro+ws", seed=1)
    load_model_state(model, checkpoint["model"], source="last.pt")
    figures = evaluate(model, Classify(), TinyData()).compute()
    assert figures == {name: summary[f"test_{name}"] for name in ("accuracy", "loss")}
    optimizer = OptimizerSettings().build(model)
    optimizer.load_state_dict(checkpoint["training"]["optimizer"])
    assert len(optimizer.state) == sum(1 for _ in model.parameters())


class SomeIgnored(Classify):
    """Images of class 0 do not count, as unlabelled pixels would not; the count stays on the device."""

    def loss(self, model, batch):
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="sum", ignore_index=0), (labels != 0).sum()


def test_a_count_on_the_device_is_exact(new_run):
    class Counted(Classify):
        def loss(self, model, batch):
            total, count = super().loss(model, batch)
            return total, torch.tensor(count)

    models = [tiny_model() for _ in range(2)]
    for model, task in zip(models, (Classify(), Counted()), strict=True):
        train(model, task, TinyData(), settings(), new_run())
    assert_same(*models, tolerance=1e-12)


def test_micro_batches_without_a_counted_sample_change_nothing(new_run):
    data = TinyData()
    assert 0 < (data.labels[:IMAGES_PER_EPOCH] == 0).sum() < IMAGES_PER_EPOCH
    models = [tiny_model() for _ in range(2)]
    for model, images_per_forward in zip(models, (1, 4), strict=True):
        train(model, SomeIgnored(), TinyData(), settings(images_per_forward=images_per_forward), new_run())
    assert_same(*models, tolerance=1e-10)
    assert all(value.isfinite().all() for value in models[0].state_dict().values())


def test_clipping_is_applied(new_run):
    """With a norm of at most 1e-9 and no momentum or weight decay, weights move by no more than the sum of the rates."""
    model = tiny_model()
    before = copy.deepcopy(model)
    optimizer = OptimizerSettings(momentum=0.0, weight_decay=0.0, clip_norm=1e-9, learning_rate=1.0)
    train(model, Classify(), TinyData(), settings(optimizer=optimizer), new_run())
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert 0 < moved.norm() <= 8e-9
