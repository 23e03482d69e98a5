"""The benchmark of the tasks' training steps learns what the study learns, on images that are always there."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is run from the repository root, not installed

from bench import tasks
from bench.detector import FixedProposals
from studies.task_cells import NORMALIZERS, PROBLEMS, Cell

from batchless.tasks.setup import set_up


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_is_the_studys(name):
    """Its network and images per step, one batch for each forward; nothing is read from the disk."""
    for normalizer, size in (("bn", 2), ("gn", 1)):
        config = tasks.on_embedded(Cell(name, normalizer, size, 0))
        assert config.data.root is None
        assert config.normalizer == normalizer
        setup = set_up(config)
        batches = tasks.first_step(config, setup)
        assert [setup.task.images(batch) for batch in batches] == [size] * (config.images_per_step // size)


@pytest.mark.parametrize("name", ["camvid", "clips", "bccd"])
def test_a_step_learns_a_little(name):
    config = tasks.on_embedded(Cell(name, "gn", 1, 0))
    setup = set_up(config)
    model = tasks.network(config, setup, seed=0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tasks.training_step(model, setup, tasks.first_step(config, setup))()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    if config.task == "detect":
        assert isinstance(model.rpn, FixedProposals)
        assert model.rpn.boxes.shape == (config.detector.proposals_per_image, 4)


def test_every_normalizer_has_its_line(monkeypatch):
    monkeypatch.setattr(tasks, "PROBLEMS", {"clips": PROBLEMS["clips"]})
    (found,) = tasks.comparisons(repeats=1, seed=0, clock=time.perf_counter, on_round=lambda *_: None)
    assert list(found.times) == [f"{normalizer}, {size} per forward" for normalizer, size in NORMALIZERS]
    assert found.items == 4
    bn, gn = (found.saved_bytes[name] for name in ("bn, 2 per forward", "gn, 1 per forward"))
    assert 1.8 < bn / gn < 2.2
