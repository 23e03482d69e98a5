"""The study of residual networks without normalization: what it measures, and its row."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # studies are run from the repository root, not installed

from studies import residual

from batchless.nn.branch_scale import RELU_VARIANCE


def test_with_skip_init_blocks_pass_on_what_they_get():
    found = residual.at_the_start("cifar_resnet8", "none(skip=skip-init)+sws", 0)
    assert len(found) == 3
    assert found[0] == pytest.approx(RELU_VARIANCE, rel=0.1)


def test_a_row_says_how_many_runs_ended_well(monkeypatch):
    found = iter([0.5, None, 0.7])
    monkeypatch.setattr(residual, "accuracy", lambda *given: next(found))
    row = residual.line("cifar_resnet8", "bn", 3, 32, 0.1, None)
    assert row.startswith("| `bn` | ")
    assert row.endswith("| 60.0 ± 14.1 | 2 of 3 |")


def test_a_training_that_explodes_has_no_accuracy(monkeypatch):
    def explode(config):
        raise ValueError("the loss or a weight became NaN or infinite after 64 images")

    monkeypatch.setattr(residual, "run_training", explode)
    assert residual.accuracy("cifar_resnet8", "none", 0, 64, 9.0, None) is None
