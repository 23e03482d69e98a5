"""The study of FedWon's tables with tiny cells: it is resumable, chooses rates by validation, and says what was published."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # studies are run from the repository root, not installed

from studies import office_caltech, office_cells
from studies.office_cells import METHODS, PUBLISHED, Cell, cells, chosen_rate
from studies.office_report import federated_tables
from studies.running import ended, kept

from batchless.arguments import parse_arguments
from batchless.data import open_domains

TINY = Cell(method="fedwon", image_size=64, images_per_step=8, rounds=1, learning_rate=0.01, clipping=0.1)


def write_images(root: Path) -> Path:
    """Two domains of two classes, 15 images each, none of them square."""
    rng = np.random.default_rng(0)
    for domain in ("amazon", "webcam"):
        for label in ("bike", "mug"):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for i in range(15):
                Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The command with two cells of seconds, its results in a folder of their own."""
    monkeypatch.setattr(office_caltech, "RESULTS", tmp_path / "results.json")
    found = [TINY, replace(TINY, method="fedavg+gn", clipping=None)]
    monkeypatch.setitem(office_cells.SECONDS, ("office", 64, 8), 10.0)
    monkeypatch.setattr(office_caltech, "cells", lambda stage, records: found)
    plain = Cell.settings

    def small(cell: Cell):
        few = {"data.images_per_client": 8, "data.validation_images": 4, "model": "cifar_resnet8"}
        return plain(cell) | few

    monkeypatch.setattr(Cell, "settings", small)
    root = write_images(tmp_path / "images")
    return ["--stage", "c", "--data.root", str(root), "--out", str(tmp_path / "out"), "--processes", "1"]


def test_cells_are_run_once_kept_and_cleaned_up(study, tmp_path, capsys):
    assert office_caltech.main(study) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 cells to do, about 0.0 hours with 1 at a time")
    records = kept(tmp_path / "results.json")
    assert set(records) == {TINY.name, replace(TINY, method="fedavg+gn", clipping=None).name}
    record = records[TINY.name]
    assert record["normalizer"] == "none+sws(gamma=constant)"
    assert record["summary"]["rounds"] == 1
    assert {line["domain"] for line in record["tests"]} == {"amazon", "webcam", "mean"}
    assert not (tmp_path / "out" / TINY.name / "checkpoints").exists()
    assert ended(tmp_path / "out" / TINY.name)
    assert office_caltech.main(study) == 0
    assert capsys.readouterr().out == ""
    (table,) = federated_tables(
        {name: each | {"image_size": 96, "images_per_step": 32} for name, each in records.items()}
    )
    row = next(line for line in table if line.startswith("| fedwon"))
    assert row.startswith("| fedwon | 1 | 0.1 | 0.01 | constant | 1 |")
    assert row.endswith("| 75.6 |")


def test_a_run_that_diverges_is_kept_as_that(study, tmp_path, monkeypatch, capsys):
    wild = [replace(TINY, method="fedavg", learning_rate=rate, clipping=None, rounds=2) for rate in (1e30, 2e30)]
    monkeypatch.setattr(office_caltech, "cells", lambda stage, records: wild)
    assert office_caltech.main(study) == 0
    assert "failed: round" in capsys.readouterr().out
    records = kept(tmp_path / "results.json")
    assert all("NaN or infinite" in record["summary"]["failed"] for record in records.values())
    assert chosen_rate(wild, records) is None
    (table,) = federated_tables(
        {name: each | {"image_size": 96, "images_per_step": 32} for name, each in records.items()}
    )
    assert "| fedavg | 2 | off | 1e+30 |  | 0, and 1 diverged |  |  |  | 66.3 |" in table
    records[wild[0].name]["summary"] = {"chosen_validation_accuracy": 0.1}
    assert chosen_rate(wild, records) == wild[0]
    assert office_caltech.main(study) == 0
    assert capsys.readouterr().out == ""


def test_a_missing_folder_is_one_line(study, tmp_path, capsys):
    shutil.rmtree(tmp_path / "images")
    assert office_caltech.main(study) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_interrupted_cell_goes_on(tmp_path):
    fresh = office_caltech.command(TINY, root=tmp_path, folder=tmp_path / "run")
    assert "--resume" not in fresh
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.pt").touch()
    again = office_caltech.command(TINY, root=tmp_path, folder=tmp_path / "run")
    assert again[3:] == ["federate", "--resume", str(tmp_path / "run"), "--data.root", str(tmp_path)]


def test_archives_hold_the_same_split_as_the_folders(tmp_path):
    root = write_images(tmp_path / "images")
    options = office_caltech._parse(["--stage", "c", "--data.root", str(root), "--out", str(tmp_path / "out")])
    folder = office_caltech.archive(TINY, options)
    for split in ("train", "test"):
        plain, packed = open_domains(root, split), open_domains(folder, split)
        assert list(plain) == list(packed)
        for domain, images in plain.items():
            ours = packed[domain]
            assert ours.classes == images.classes
            assert [ours.label(i) for i in range(len(ours))] == [images.label(i) for i in range(len(images))]
            assert ours.image(0).shape == (3, 64, 64)
            light = [float(data.image(0).float().mean()) for data in (ours, images)]
            assert light[0] == pytest.approx(light[1], abs=3)


def test_every_cell_is_a_run_that_can_be_asked_for():
    """All stages as on the first day, and the later seeds once rates are chosen: words that `batchless federate` takes."""
    found = {stage: cells(stage, {}) for stage in "abcde"}
    assert {stage: len(each) for stage, each in found.items()} == {"a": 8, "b": 54, "c": 14, "d": 5, "e": 6}
    for cell in {cell.name: cell for each in found.values() for cell in each}.values():
        words = office_caltech.command(cell, root=Path("/data"), folder=Path("/runs") / cell.name)
        config = parse_arguments(words[3:])
        assert config.optimizer.learning_rate == cell.learning_rate
        clipping = config.client_settings(device="cpu").optimizer.adaptive_clipping
        assert clipping == cell.clipping, cell.name
        assert config.rounds == cell.rounds
    assert {method for method, _ in PUBLISHED} == set(METHODS)


def test_the_learning_rate_is_chosen_by_validation():
    first = cells("c", {})
    records = {
        cell.name: {"summary": {"chosen_validation_accuracy": {0.01: 0.5, 0.03: 0.6, 0.08: 0.6}[cell.learning_rate]}}
        for cell in first
    }
    later = [cell for cell in cells("c", records) if cell.seed]
    assert [(cell.method, cell.clipping, cell.learning_rate, cell.seed) for cell in later] == [
        (method, clipping, 0.03, seed)
        for method in ("fedwon", "without")
        for clipping in (0.1, None)
        for seed in (1, 2)
    ]
    del records[first[0].name]
    assert chosen_rate(first[:3], records) is None
    assert {cell.name for cell in first} <= {cell.name for cell in cells("b", {})} | {
        cell.name for cell in first if cell.method == "without" or cell.rounds == 300
    }


def test_the_estimate_learns_from_cells_that_have_ended():
    cell = next(office_cells.stage_a())
    assert "0.7 hours with 1 at a time" in office_caltech.estimate([cell], {}, processes=1)
    record = {"data": "office", "image_size": 256, "images_per_step": 32, "summary": {"seconds": 720.0, "rounds": 10}}
    assert "1.0 hours with 2 at a time" in office_caltech.estimate([cell], {"x": record}, processes=2)
