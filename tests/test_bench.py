"""The benchmarks' contestants compute what batchless computes, and their clock work is right; no time is asserted."""

import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is run from the repository root, not installed

from bench import detector, inference, lean_targets, loading, norms, passes, step, step_targets, weights
from bench.__main__ import main
from bench.formulas import (
    AuthorsBatchChannelNorm,
    authors_conv,
    authors_standardized,
    timm_conv,
    timm_standardized,
    with_layers,
)
from bench.report import busy_warning, comparison_lines
from bench.saved import peak_bytes, saved_in_step
from bench.timing import Comparison, Ratio, Target, interleave, judge, ratio, spread

from batchless.cli import main as batchless_main
from batchless.nn import BatchChannelNorm, WSConv2d, standardize_weight
from batchless.runs import read_run

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def weight_and_gradient(standardize: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    leaf = weight.clone().requires_grad_()
    output = standardize(leaf)
    output.backward(torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).reshape(weight.shape))
    return output.detach(), leaf.grad


@pytest.mark.parametrize("shape", [(8, 3, 7, 7), (16, 8, 1, 1), (6, 2, 3, 3)])
@pytest.mark.parametrize(("theirs", "preset"), [(authors_standardized, "authors"), (timm_standardized, "timm")])
def test_others_weight_standardization_is_our_preset(theirs, preset, shape):
    weight = 0.3 * torch.randn(shape, dtype=torch.float64) + 0.1
    ours = weight_and_gradient(partial(standardize_weight, preset=preset), weight)
    torch.testing.assert_close(weight_and_gradient(theirs, weight), ours, **EXACT)


@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"groups": 2, "bias": True}, {"padding": "same"}])
@pytest.mark.parametrize(("theirs", "preset"), [(authors_conv, "authors"), (timm_conv, "timm")])
def test_others_convolution_is_our_layer(theirs, preset, settings):
    plain = nn.Conv2d(4, 8, 3, **{"bias": False, **settings}).double()
    ours = WSConv2d(4, 8, 3, preset=preset, **{"bias": False, **settings}).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(theirs(plain)(x), ours(x), **EXACT)


def test_timm_form_is_the_weight_inside_timms_layer():
    layer = StdConv2d(3, 5, 3).double()
    identity = torch.zeros(3, 3, 5, 5, dtype=torch.float64)
    identity[torch.arange(3), torch.arange(3), 2, 2] = 1  # its response to an impulse is the kernel, mirrored
    response = layer(identity)[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1)
    torch.testing.assert_close(response, timm_standardized(layer.weight), **EXACT)


@pytest.mark.parametrize("images", [1, 3])
def test_authors_bcn_is_ours_outside_accumulate(images):
    rate, channels, groups = 0.05, 12, 4
    memory = 1 / (1 - (1 - rate) ** (1 / images))
    theirs = AuthorsBatchChannelNorm(channels, groups, rate=rate).double()
    theirs.batch_norm.rate.fill_(rate)  # in float64
    ours = BatchChannelNorm(channels, groups, memory=memory, warmup=False, dtype=torch.float64)
    for mine, other in ((ours.batch_norm, theirs.batch_norm), (ours, theirs)):
        for name in ("weight", "bias"):
            getattr(mine, name).data = torch.randn(len(getattr(mine, name)), dtype=torch.float64)
            getattr(other, name).data = getattr(mine, name).data.reshape(getattr(other, name).shape).clone()
    for _ in range(4):
        x = 2 * torch.randn(images, channels, 5, 6, dtype=torch.float64) + 3
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(leaf) for layer, leaf in zip((theirs, ours), inputs, strict=True)]
        torch.testing.assert_close(*outputs, **EXACT)
        for output in outputs:
            output.backward(torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape))
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **EXACT)
    for buffer in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(theirs.batch_norm, buffer), getattr(ours.batch_norm, buffer), **EXACT)
    assert theirs.batch_norm.running_mean.abs().min() > 0.1  # they moved
    moved = theirs.batch_norm.running_mean.clone()
    theirs.eval()(x)
    assert torch.equal(theirs.batch_norm.running_mean, moved)


class Small(nn.Module):
    """Two blocks such as ResNet's, a classifier with the thousand classes of the benchmark's targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x).mean((2, 3)))


def after_two_steps(models: step.Models, images: step.MicroBatches) -> dict[str, list[Tensor]]:
    parameters = {}
    for name, (contestant, model) in models.items():
        run = contestant(model, images)
        run()
        run()
        step.require_finite({name: model})
        parameters[name] = [parameter.detach() for parameter in model.parameters()]
    return parameters


@pytest.fixture
def double_images() -> list[tuple[Tensor, Tensor]]:
    return [(image.double(), target) for image, target in step.micro_batches(3, image_size=16)]


def test_gn_contestants_make_the_same_steps(double_images, monkeypatch):
    monkeypatch.setattr(step, "_sgd", lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    model = Small().double()
    after = after_two_steps(step.gn_models(model), double_images)
    torch.testing.assert_close(after["gn, plain loop"], after["gn, accumulate"], **EXACT)
    torch.testing.assert_close(after["gn + timm's StdConv2d, plain loop"], after["gn+ws, accumulate"], **EXACT)
    torch.testing.assert_close(after["gn + authors' ws, plain loop"], after["gn+ws, accumulate"], rtol=0.1, atol=0.01)
    before = list(model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(after["gn, accumulate"], before, strict=True))  # it stepped


def test_bcn_contestants_start_from_the_same_parameters_and_step(double_images):
    model = Small().double()
    models = step.bcn_models(model)
    convolutions = [
        [layer.weight.detach().clone() for layer in contestant.modules() if isinstance(layer, nn.Conv2d)]
        for _, contestant in models.values()
    ]
    assert [len(found) for found in convolutions] == [2, 2, 2]
    torch.testing.assert_close(convolutions[0], convolutions[1], rtol=0, atol=0)
    torch.testing.assert_close(convolutions[0], convolutions[2], rtol=0, atol=0)
    after_two_steps(models, double_images)
    authors = [layer for _, m in models.values() for layer in m.modules() if isinstance(layer, AuthorsBatchChannelNorm)]
    assert len(authors) == 2
    assert all(bool((layer.batch_norm.running_mean != 0).all()) for layer in authors)


def test_pairs_are_judged_by_the_targets_of_the_whole_comparisons(monkeypatch):
    monkeypatch.setattr("torchvision.models.resnet50", Small)
    for module in (step, step_targets):
        monkeypatch.setattr(module, "IMAGE_SIZE", 16)
    asked = {"repeats": 1, "seed": 0, "clock": time.perf_counter, "on_round": lambda *_: None}
    whole, pairs = list(step.comparisons(**asked)), list(step_targets.comparisons(**asked))
    assert [found.title for found in pairs] == [found.title for found in whole]
    assert [found.title.split(", ")[-1] for found in pairs] == ["1 per step"] * 2 + ["8 per step"] * 2
    assert [target.at_most for found in pairs for target in found.targets] == [1.08, 1.12, 1.03, 1.06]
    for pair, found in zip(pairs, whole, strict=True):
        assert pair.targets == found.targets[:1]
        assert set(pair.times) == {pair.targets[0].of, pair.targets[0].base} < set(found.times)


def test_each_lean_level_is_held_against_the_plain_network_alone(monkeypatch):
    monkeypatch.setattr("torchvision.models.resnet50", Small)
    monkeypatch.setattr(lean_targets, "IMAGE_SIZE", 16)
    asked = {"repeats": 1, "seed": 0, "clock": time.perf_counter, "on_round": lambda *_: None}
    pairs = list(lean_targets.comparisons(**asked))
    assert [set(pair.times) for pair in pairs] == [{"plain", "lean 1"}, {"plain", "lean 2"}] * 2
    assert [(pair.targets[0].of, pair.targets[0].at_most) for pair in pairs] == [("lean 1", 1.05), ("lean 2", 1.15)] * 2
    assert [pair.title.split(",")[0] for pair in pairs] == ["ResNet-50 bn"] * 2 + ["ResNet-50 bcn-micro+ws"] * 2


def test_bytes_are_those_inside_a_step_and_leave_the_model_alone(double_images):
    models = step.bcn_models(Small().double())
    image = double_images[0][0]
    kept = {name: saved_in_step(model, image) for name, (_, model) in models.items()}
    maps = 8 * 64 * (7 * 7 + 3 * 3)  # each convolution's output, in float64; each activation's is as large
    assert 2 * maps <= kept["bn, plain loop"] <= 2.5 * maps
    assert kept["bcn-micro+ws, accumulate"] <= 1.05 * kept["bn, plain loop"]  # vectors weigh more on small maps
    weights = sum(
        8 * layer.weight.numel() for layer in models["bn, plain loop"][1].modules() if isinstance(layer, nn.Conv2d)
    )
    assert kept["authors' bcn + ws, plain loop"] > 4 * maps + weights
    assert all(getattr(m, "step_sums", None) is None for _, model in models.values() for m in model.modules())


def test_with_layers_copies_and_replaces_exact_types_only():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(WSConv2d(4, 4, 3)))
    replaced = with_layers(model, {nn.Conv2d: authors_conv})
    assert type(model[0]) is nn.Conv2d
    assert type(replaced[0]) is not nn.Conv2d
    assert type(replaced[1][0]) is WSConv2d
    assert replaced[0].weight is not model[0].weight
    assert torch.equal(replaced[0].weight, model[0].weight)


def test_a_diverged_network_has_no_time():
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="gn diverged"):
        step.require_finite({"gn": model})


@pytest.fixture
def _no_collection(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a full one takes longer here than all else


class FakeMachine:
    """A clock that only the contestants move, by what they cost in the round they are in."""

    def __init__(self, costs: dict[str, list[float]]) -> None:
        self.now, self.costs = 100.0, {name: list(per_round) for name, per_round in costs.items()}
        self.order: list[str] = []
        self.collecting: list[bool] = []

    def contestants(self) -> dict[str, Callable[[], object]]:
        return {name: partial(self.work, name) for name in self.costs}

    def work(self, name: str) -> None:
        self.now += self.costs[name].pop(0)
        self.order.append(name)
        self.collecting.append(gc.isenabled())


@pytest.mark.usefixtures("_no_collection")
def test_interleave_times_every_round_but_the_warm_up():
    machine = FakeMachine({"a": [50, 1, 2, 3], "b": [70, 4, 5, 6]})
    rounds = []
    times = interleave(
        machine.contestants(), repeats=3, clock=lambda: machine.now, on_round=lambda *done: rounds.append(done)
    )
    assert times == {"a": (1, 2, 3), "b": (4, 5, 6)}
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not any(machine.collecting)
    assert gc.isenabled()


@pytest.mark.usefixtures("_no_collection")
def test_interleave_turns_the_collector_on_again_after_a_failure():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, repeats=1)
    assert gc.isenabled()


@pytest.mark.usefixtures("_no_collection")
def test_interleave_shuffles_the_rounds_by_its_seed():
    def order(seed: int) -> list[str]:
        machine = FakeMachine(dict.fromkeys("abcd", [1.0] * 9))
        interleave(machine.contestants(), repeats=8, seed=seed, clock=lambda: machine.now)
        return machine.order

    turns = [order(0)[start : start + 4] for start in range(0, 36, 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 3
    assert order(0) == order(0) != order(1)


def test_interleave_refuses_no_repeats():
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        interleave({}, repeats=0)


def test_ratio_of_minima_and_of_each_round():
    times = {"slow": (2.0, 9.0, 4.0), "base": (1.0, 3.0, 8.0)}
    measured = ratio(times, "slow", "base")
    assert (measured.minima, measured.paired) == (2.0, 2.0)
    assert measured.low <= measured.paired <= measured.high
    assert measured.low < measured.high


def test_what_slows_a_round_down_cancels():
    rounds = (1.0, 1.5, 7.0, 1.1, 3.0)
    measured = ratio({"twice": tuple(2 * r for r in rounds), "base": rounds}, "twice", "base")
    assert measured == Ratio(rounds=5, minima=2.0, paired=2.0, low=2.0, high=2.0)


def test_a_machine_that_slows_down_for_an_hour_does_not_widen_the_interval():
    machine = [1.0] * 9 + [1.4] * 9  # two hours; the medians of the two may come from different ones
    noise = (1 + 0.02 * torch.rand(2, 18, dtype=torch.float64)).tolist()
    times = {name: tuple(m * n for m, n in zip(machine, noise[row], strict=True)) for row, name in enumerate("ab")}
    measured = ratio(times, "a", "b")
    assert 0.98 < measured.low <= measured.high < 1.02


def test_the_interval_holds_the_true_ratio_and_narrows_with_the_rounds():
    def interval(count: int) -> Ratio:
        noise = 1 + 0.2 * torch.rand(2, count, dtype=torch.float64)
        return ratio({"a": tuple((3 * noise[0]).tolist()), "b": tuple(noise[1].tolist())}, "a", "b")

    few, many = interval(10), interval(1000)
    assert many.low < 3 < many.high
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("minima", "low", "high", "verdict"),
    [(0.4, 0.4, 0.5, "met"), (0.4, 0.4, 0.51, "undecided"), (0.49, 0.6, 0.7, "undecided"), (0.6, 0.51, 0.7, "missed")],
)
def test_a_target_is_judged_by_minima_and_interval(minima, low, high, verdict):
    target = Target(of="a", base="b", at_most=0.5)
    for rounds, expected in ((6, verdict), (5, "undecided")):
        measured = Ratio(rounds=rounds, minima=minima, paired=(low + high) / 2, low=low, high=high)
        assert judge(target, measured) == expected


def test_spread_is_the_middle_half_over_the_median():
    assert spread((1.0, 2.0, 3.0, 4.0, 5.0)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("kept", "verdict"), [(101, "met"), (102, "missed")])
def test_bytes_are_judged_exactly(kept, verdict):
    comparison = Comparison(
        title="two ways",
        base="b",
        times={"a": (1.0,), "b": (1.0,)},
        byte_targets=(Target(of="a", base="b", at_most=1.01),),
        saved_bytes={"a": kept, "b": 100},
    )
    assert comparison_lines(comparison)[-1].split()[-3:] == [f"{kept / 100:.3f}", "exact", verdict]


def test_the_table_shows_ratios_targets_and_bandwidth():
    comparison = Comparison(
        title="two ways",
        base="slow",
        times={"fast": (0.01,) * 6, "slow": (0.04,) * 6},
        targets=(Target(of="fast", base="slow", at_most=0.5),),
        bytes_moved={"fast": 10**8, "slow": 10**8},
    )
    text = "\n".join(comparison_lines(comparison))
    fast = next(line for line in text.splitlines() if line.startswith("fast")).split()
    assert fast == ["fast", "10.0", "10.0", "0%", "0.250", "0.250", "0.250..0.250", "10.0"]
    assert "fast <= 0.5 x slow" in text
    assert text.endswith("met")


@pytest.mark.parametrize(("before", "after", "busy"), [(0.2, 1.4, False), (1.6, 1.0, True), (0.1, 1.6, True)])
def test_a_busy_machine_is_warned_of(before, after, busy):
    assert (busy_warning(before, after, threads=1) is not None) is busy
    assert busy_warning(before, after, threads=2) is None
    assert busy_warning(None, None, threads=1) is None


def small_weights(monkeypatch) -> None:
    monkeypatch.setattr(weights, "resnet50_weights", lambda seed: [torch.randn(8, 4, 3, 3, requires_grad=True)])


def test_the_command_leaves_a_run_folder_that_compare_shows(monkeypatch, tmp_path, capsys):
    small_weights(monkeypatch)
    out = tmp_path / "bench-weights"
    assert main(["weights", "--repeats", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    run = read_run(out)
    assert run.environment["torch_threads"] == 1
    assert run.config == {
        "kind": "bench",
        "benchmark": "weights",
        "repeats": 2,
        "threads": 1,
        "clock": "wall",
        "seed": 0,
    }
    (comparison,) = json.loads((out / "comparisons.json").read_text())
    assert {"batchless", "timm", "authors", "w * 1.0", "memory copy"} <= set(comparison["seconds"])
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in comparison["seconds"].values())
    assert comparison["bytes_moved"]["batchless"] == 5 * 4 * 8 * 4 * 9
    contestants, targets = comparison["tables"]
    assert "GB/s" in contestants[0]
    assert [row[0] for row in targets[1:]] == [
        "batchless, in a step <= 0.5 x timm",
        "batchless, in a step <= 0.12 x authors",
    ]
    assert all(cell in printed for row in contestants + targets for cell in row)
    assert batchless_main(["compare", str(out), "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["benchmarks"][0]["comparisons"][0]["tables"] == [contestants, targets]


def test_a_benchmark_that_fails_keeps_what_was_timed(monkeypatch, tmp_path):
    small_weights(monkeypatch)

    def then_fails(**settings):
        yield from weights_comparisons(**settings)
        raise RuntimeError("no memory")

    weights_comparisons = weights.comparisons
    monkeypatch.setattr(weights, "comparisons", then_fails)
    with pytest.raises(RuntimeError, match="no memory"):
        main(["weights", "--repeats", "1", "--out", str(tmp_path / "run")])
    assert read_run(tmp_path / "run").summary == {"failed": "no memory"}
    assert len(json.loads((tmp_path / "run" / "comparisons.json").read_text())) == 1
    assert main(["weights", "--out", str(tmp_path / "run")]) == 2  # never over another run


def test_the_floor_is_five_passes_at_the_copys_speed():
    note = weights.floor_note({"memory copy": (0.004, 0.008), "timm": (0.04, 0.05)})
    assert note.endswith("are 10.0 ms, 0.250 of timm")


def test_a_step_has_twice_the_weights_beside_them_at_most():
    torch.manual_seed(0)
    made = [torch.randn(8, 4, 3, 3, requires_grad=True), torch.randn(64, 8, 3, 3, requires_grad=True)]
    note = weights.peak_note(made, [torch.randn_like(weight) for weight in made])
    size = sum(weight.nbytes for weight in made)
    rows = 8 * (8 + 64)  # mean and deviation of each row
    assert f"at most {(2 * size + rows) / 1e6:.1f} MB, {2 + rows / size:.3f} of theirs" in note


def test_the_peak_is_what_was_there_at_one_time():
    def run():
        first = torch.empty(1000)
        del first
        return torch.empty(500) + 1  # both are there for a moment

    assert peak_bytes(run) == 4000


def test_resnet50_has_53_convolution_weights():
    found = weights.resnet50_weights(0)
    assert len(found) == 53
    assert sum(weight.numel() for weight in found) == 23_454_912


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "invalid choice"),
        (["weights", "--repeats", "0"], "must be 1 or more"),
        (["weights", "--clock", "cpu", "--threads", "2"], "--threads 1"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_proposals_are_fixed_while_the_network_trains():
    boxes = detector.random_boxes(5)
    network = detector.FixedProposals(lambda images, features, targets: (["its own"], {"loss": len(features)}), boxes)
    proposals, losses = network(None, [1, 2], [{}, {}])
    assert len(proposals) == 2
    assert all(found is boxes for found in proposals)
    assert losses == {"loss": 2}


def test_the_scene_lies_within_the_image():
    torch.manual_seed(0)
    image, objects, proposals = detector.scene()
    assert image.shape == (3, detector.IMAGE_SIZE, detector.IMAGE_SIZE)
    assert len(proposals) == detector.PROPOSALS
    for boxes in (objects["boxes"], proposals):
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
        assert bool(((boxes >= 0) & (boxes <= detector.IMAGE_SIZE)).all())


def test_resnet50_has_53_normalizations_of_eleven_million_values():
    shapes = norms.resnet50_shapes()
    assert len(shapes) == 53
    assert sum(torch.Size(shape).numel() for shape in shapes) == 11_113_984


def test_the_normalizations_timed_agree():
    x = torch.randn(1, 64, 5, 5, dtype=torch.float64)
    fused = norms.collecting(64).double()
    composed = norms.composed(copy.deepcopy(fused))
    torch.testing.assert_close(fused(x), composed(x), **EXACT)
    assert fused.batch_norm.waiting() is None  # so small a map is in the sums at once
    torch.testing.assert_close(fused.batch_norm.step_sums, composed.batch_norm.step_sums, **EXACT)


def test_inference_leaves_no_graph():
    layer = nn.Conv2d(1, 1, 1)
    inference.forward(layer, torch.ones(1, 1, 2, 2))()
    assert layer.weight.grad is None


def test_folded_networks_infer_beside_plain_ones(monkeypatch):
    monkeypatch.setattr(inference, "IMAGE_SIZE", 32)
    monkeypatch.setattr(inference.torchvision.models, "resnet50", resnet18)
    (found,) = inference.comparisons(repeats=1, seed=0, clock=time.perf_counter, on_round=lambda *_: None)
    assert list(found.times) == ["bn", "gn", "gn+ws", "gn+ws, folded", "bcn-micro+ws", "bcn-micro+ws, folded"]
    assert {target.of for target in found.targets} == {"gn+ws, folded", "bcn-micro+ws, folded"}


@pytest.mark.parametrize(
    ("written", "small"),
    [
        (loading.classification, {"files": 2, "model": "cifar_resnet8", "size": 16}),
        (loading.detection, {"files": 2, "side": 64}),
        (loading.segmentation, {"files": 2, "model": "cifar_resnet8_lraspp", "side": 32}),
        (loading.video, {"files": 2, "model": "tsm:cifar_resnet8", "size": 16}),
    ],
    ids=["classification", "detection", "segmentation", "video"],
)
def test_loading_reads_the_files_that_are_learned_from(tmp_path, written, small):
    workload = written(tmp_path, **small)
    assert len(workload.files) == 2
    found = loading.contestants(workload, seed=0)
    assert list(found) == ["forward and backward", "load", "of it: decode"]
    found["forward and backward"]()
    images = found["of it: decode"]()
    assert len(images) == 2
    assert all(len(image) for image in images)
    for file in workload.files:
        file.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=workload.files[0].stem):
        found["load"]()


def test_much_loading_is_advised_against():
    advice = loading.waiting_note({"load": (0.3, 0.3), "forward and backward": (0.7, 0.7)})
    assert advice.startswith("30 % of the training time was spent waiting for data: raise data.workers")
    little = loading.waiting_note({"load": (0.1,), "forward and backward": (0.9,)})
    assert little == "loading is 10 % of a training without workers"


def test_single_passes_compute_what_they_are_called():
    torch.manual_seed(0)
    signal = passes.Signal((1, 64, 5, 7))
    bn, gn = nn.BatchNorm2d(64), nn.GroupNorm(32, 64)
    for layer, name in ((bn, "bn"), (gn, "gn")):
        for parameter in layer.parameters():
            parameter.data.fill_(1)
        leaf = signal.x.clone().requires_grad_()
        output = layer(leaf)
        output.backward(signal.gradient)
        torch.testing.assert_close(passes.PASSES[f"{name} forward"][1](signal)[0], output.detach())
        torch.testing.assert_close(passes.PASSES[f"{name} backward"][1](signal)[0], leaf.grad, rtol=1e-4, atol=1e-4)
    z = passes.PASSES["z and moments: native_group_norm, C groups"][1](signal).normalized.view_as(signal.x)
    of_ones, of_z = passes.PASSES["sums of g and g z: native_group_norm_backward"][1](signal)
    torch.testing.assert_close(of_ones, signal.gradient.sum((0, 2, 3)))
    torch.testing.assert_close(of_z, (signal.gradient * z).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    expected = signal.scale * (signal.gradient_rows + signal.rows) + signal.shift
    torch.testing.assert_close(passes.PASSES["dx: mul, addcmul_, add_"][1](signal), expected)
    torch.testing.assert_close(
        passes.PASSES["output anew: addcmul"][1](signal), signal.scale * signal.rows + signal.shift
    )


def test_every_single_pass_has_its_bytes(monkeypatch):
    monkeypatch.setattr(passes, "resnet50_shapes", lambda: [(1, 32, 2, 3), (1, 64, 1, 2)])
    (found,) = passes.comparisons(repeats=1, seed=0, clock=time.perf_counter, on_round=lambda *_: None)
    size = 4 * (32 * 6 + 64 * 2)
    assert found.bytes_moved["memory copy"] == 2 * size
    assert found.bytes_moved["autograd.Function that does nothing"] == 0
    assert list(found.times) == list(found.bytes_moved) == list(passes.PASSES)


def test_images_per_second_are_those_of_the_median():
    comparison = Comparison(title="two", base="slow", times={"fast": (0.01,) * 8, "slow": (0.04,) * 8}, items=2)
    rows = [line.split() for line in comparison_lines(comparison)]
    assert [row[-1] for row in rows if row and row[0] in ("fast", "slow")] == ["200.0", "50.0"]
    assert "images/s" in rows[2]
