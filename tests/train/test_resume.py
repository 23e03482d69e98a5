"""A run that is interrupted anywhere and resumed ends with the bits of one that was not."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TinyData, settings, tiny_model
from torch import nn

from batchless.runs import RunFolder, load_checkpoint
from batchless.tasks import Classify
from batchless.train import OptimizerSettings, TrainingStoppedError, loop, train

STEPS = 8
"""Of 27 images: 4 4 2, 4 4 2, 4 3."""


class PowerCutError(Exception):
    """The process is gone."""


@pytest.fixture(autouse=True)
def _log_every_step(monkeypatch):
    monkeypatch.setattr(loop, "_LOG_EVERY_SECONDS", -1)


def network(normalizer: str) -> nn.Module:
    """With dropout: what the model draws must come back too."""
    model = tiny_model(normalizer, dtype=torch.float32)
    model.insert(len(model) - 1, nn.Dropout(0.3))
    return model


def run_once(
    folder: Path, model: nn.Module, options: dict[str, Any], *, stop: Callable[[], bool], task: Classify
) -> dict:
    """Start in `folder`, or go on there."""
    last = folder / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(last) if last.exists() else None
    if (folder / "config.yaml").exists():
        run = RunFolder.resume(folder, images=0)
        if checkpoint is None:
            run.forget_metrics_after(0)
    else:
        run = RunFolder.create(folder, config={}, seed=0)
    with run:
        return train(
            model, task, TinyData(torch.float32), settings(**options), run, resume_from=checkpoint, should_stop=stop
        )


def never() -> bool:
    return False


def after(steps: int) -> Callable[[], bool]:
    """True from the given step on."""
    calls = iter(range(10**6))
    return lambda: next(calls) >= steps - 1


class CutTask(Classify):
    """The process is gone in the middle of a step."""

    def __init__(self, micro_batches: int) -> None:
        super().__init__()
        self.left = micro_batches

    def loss(self, model, batch):
        self.left -= 1
        if self.left < 0:
            raise PowerCutError
        return super().loss(model, batch)


def assert_equal_runs(first: Path, second: Path) -> None:
    for name in ("last", "best"):
        states = [load_checkpoint(folder / "checkpoints" / f"{name}.pt") for folder in (first, second)]
        for state in states:
            state.get("training", {}).get("progress", {}).pop("seconds", None)
            state.get("training", {}).get("progress", {}).pop("metrics_bytes", None)
        assert_same(*states, where=name)
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (first, second)
    ]
    assert logs[0] == logs[1]


def assert_same(first: Any, second: Any, *, where: str) -> None:
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], where=f"{where}.{key}")
    elif isinstance(first, list | tuple):
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, where=f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"average": 20.0, "optimizer": OptimizerSettings(name="adamw", learning_rate=1e-3)},
    "half": {"precision": "bf16"},
    "scaled": {"precision": "fp16", "optimizer": OptimizerSettings(clip_norm=1.0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("normalizer", ["bcn-micro+ws", "bn"])
def test_stopped_after_any_step(normalizer, options, tmp_path):
    start = network(normalizer)
    run_once(tmp_path / "whole", copy.deepcopy(start), options, stop=never, task=Classify())
    for steps in (1, 3, 5, STEPS):
        folder = tmp_path / str(steps)
        with pytest.raises(TrainingStoppedError):
            run_once(folder, copy.deepcopy(start), options, stop=after(steps), task=Classify())
        run_once(folder, network(normalizer), options, stop=never, task=Classify())
        assert_equal_runs(tmp_path / "whole", folder)


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9], ids=["each-step", "before-evaluations"])
def test_cut_off_in_any_step(checkpoint_seconds, tmp_path):
    """Without warning: what was logged after the last checkpoint is logged again, not twice."""
    start, options = network("bcn-micro+ws"), {"checkpoint_seconds": checkpoint_seconds}
    run_once(tmp_path / "whole", copy.deepcopy(start), options, stop=never, task=Classify())
    for micro_batches in (0, 1, 4, 7, 13):
        folder = tmp_path / str(micro_batches)
        with pytest.raises(PowerCutError):
            run_once(folder, copy.deepcopy(start), options, stop=never, task=CutTask(micro_batches))
        with (folder / "metrics.jsonl").open("ab") as log:
            log.write(b'{"kind": "tr')  # half a line
        run_once(folder, copy.deepcopy(start), options, stop=never, task=Classify())
        assert_equal_runs(tmp_path / "whole", folder)


def test_cut_off_in_an_evaluation(tmp_path):
    class CutEvaluation(Classify):
        def metric(self):
            raise PowerCutError

    start = network("gn+ws")
    run_once(tmp_path / "whole", copy.deepcopy(start), {}, stop=never, task=Classify())
    with pytest.raises(PowerCutError):
        run_once(tmp_path / "cut", copy.deepcopy(start), {}, stop=never, task=CutEvaluation())
    run_once(tmp_path / "cut", network("gn+ws"), {}, stop=never, task=Classify())
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_stopped_in_an_evaluation(tmp_path):
    """Ctrl-C in a long evaluation does not wait for its end."""
    start = network("gn+ws")
    with pytest.raises(TrainingStoppedError, match="14 images"):
        run_once(tmp_path / "cut", copy.deepcopy(start), {}, stop=after(5), task=Classify())
    run_once(tmp_path / "whole", copy.deepcopy(start), {}, stop=never, task=Classify())
    run_once(tmp_path / "cut", network("gn+ws"), {}, stop=never, task=Classify())
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path):
    run_once(tmp_path / "run", network("bn"), {"evaluations": 8}, stop=never, task=Classify())
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tests = [record for record in log if record["kind"] == "test"]
    best = max(tests, key=lambda record: record["accuracy"])  # the first of equals
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert checkpoint["images"] == best["images"]
    assert checkpoint["figures"]["accuracy"] == best["accuracy"]


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ({"average": 20.0}, {}, "other settings of average"),
        ({}, {"average": 20.0}, "other settings of average"),
        ({}, {"precision": "fp16"}, "other settings of average or precision"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(written, read, message, tmp_path):
    with pytest.raises(TrainingStoppedError):
        run_once(tmp_path / "run", network("bn"), written, stop=after(2), task=Classify())
    with pytest.raises(ValueError, match=message):
        run_once(tmp_path / "run", network("bn"), read, stop=never, task=Classify())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    with pytest.raises(TrainingStoppedError):
        run_once(tmp_path / "run", network("bn"), {}, stop=after(2), task=Classify())
    with pytest.raises(ValueError, match=r"of another training .*another network"):
        run_once(tmp_path / "run", network("bcn-micro"), {}, stop=never, task=Classify())


def test_a_checkpoint_to_use_is_none_to_go_on_from(tmp_path):
    run_once(tmp_path / "run", network("bn"), {}, stop=never, task=Classify())
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    with pytest.raises(ValueError, match=r"resume from last\.pt"):
        train(network("bn"), Classify(), TinyData(torch.float32), settings(), None, resume_from=best)
