"""The study of tasks with tiny cells: it is resumable, like for like, keeps failures, and makes tables of what it kept."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # studies are run from the repository root, not installed

from studies import task_cells, tasks
from studies.running import ended, kept
from studies.task_cells import NORMALIZERS, PROBLEMS, Cell, cells
from studies.task_published import PUBLISHED
from studies.task_report import task_tables

from batchless.arguments import parse_arguments
from batchless.data.open_objects import open_objects
from batchless.runs import RunFolder

CELL = Cell("clips", "gn+ws", 1, 0)


def words_of(cell: Cell, tmp_path: Path) -> list[str]:
    options = tasks._parse(["--out", str(tmp_path), "--data.root", "/data"])
    return tasks.command(cell, options)[3:]


def test_every_cell_is_a_run_that_can_be_asked_for(tmp_path):
    configs = {cell: parse_arguments(words_of(cell, tmp_path)) for cell in cells()}
    assert len({config.folder() for config in configs.values()}) == len(configs) == 30
    for cell, config in configs.items():
        problem = PROBLEMS[cell.problem]
        assert (config.normalizer, config.images_per_forward, config.seed) == (
            cell.normalizer,
            cell.images_per_forward,
            cell.seed,
        )
        assert config.data.root == (None if problem.folder is None else f"/data/{problem.folder}")


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_trained_differs_by_the_normalizer_only(name, tmp_path):
    plain = [parse_arguments(words_of(cell, tmp_path)).plain() for cell in cells((name,)) if cell.seed == 0]
    for config in plain:
        for own in ("normalizer", "images_per_forward", "out"):
            del config[own]
    assert len(plain) == len(NORMALIZERS)
    assert all(config == plain[0] for config in plain)


def test_budgets_are_the_problems_and_a_step_is_a_whole_number_of_forwards():
    for cell in cells():
        config = parse_arguments(words_of(cell, Path("/runs")))
        assert config.images == PROBLEMS[cell.problem].images
        assert config.images_per_step % config.images_per_forward == 0


def test_coco128_is_split_into_96_and_32_images(tmp_path):
    names = [f"{index:012}.jpg" for index in range(128)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in names:
        (tmp_path / "val2017" / name).touch()
    content = {
        "images": [{"id": index, "file_name": name, "height": 9, "width": 9} for index, name in enumerate(names)],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    train, test = ({image.source for image in open_objects(tmp_path, split).images} for split in ("train", "test"))
    assert (len(train), len(test)) == (96, 32)
    assert not train & test


def test_every_question_is_asked_once_before_any_is_asked_again():
    seeds = [cell.seed for cell in cells()]
    assert seeds == sorted(seeds)
    assert {cell.problem for cell in cells() if cell.seed == 0} == set(PROBLEMS)


def test_an_interrupted_cell_goes_on(tmp_path):
    assert "--resume" not in words_of(CELL, tmp_path)
    (tmp_path / CELL.name / "checkpoints").mkdir(parents=True)
    (tmp_path / CELL.name / "checkpoints" / "last.pt").touch()
    assert words_of(CELL, tmp_path) == ["train", "--resume", str(tmp_path / CELL.name)]


@pytest.mark.parametrize("change", [{}, {"images": 7}, {"model": "tsm:torchvision:resnet18"}, {"no_more": 1}])
def test_a_cell_goes_on_only_with_the_settings_that_it_has_now(change, tmp_path, monkeypatch):
    options = tasks._parse(["--out", str(tmp_path), "--data.root", "/moved/since"])
    folder = tmp_path / CELL.name
    config = parse_arguments(words_of(CELL, tmp_path / "elsewhere"))
    with RunFolder.create(folder, config=config.plain() | change, seed=0, tensorboard=False):
        pass
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.pt").touch()
    commands: list[list[str]] = []
    monkeypatch.setattr(tasks, "run_cell", lambda name, words: commands.append(words) or "stopped")
    assert not tasks._run(CELL, options)
    assert ["--resume" in words for words in commands] == [not change]
    assert folder.exists() == (not change)


def test_the_estimate_learns_from_cells_that_have_ended():
    assert "1 cells to do, about 0.0 hours" in tasks.estimate([CELL], {}, processes=2)
    record = {"problem": "clips", "summary": {"seconds": 7200.0}}
    assert "about 1.0 hours with 2 at a time" in tasks.estimate([CELL], {"x": record}, processes=2)
    timed = record | {"command_seconds": 14400.0}  # with the evaluations, which are not in the summary's seconds
    assert "about 2.0 hours with 2 at a time" in tasks.estimate([CELL], {"x": timed}, processes=2)
    failed = {"problem": "clips", "summary": {"failed": "the loss is nan"}, "command_seconds": 1.0}
    assert "about 1.0 hours with 2 at a time" in tasks.estimate([CELL], {"x": record, "y": failed}, processes=2)


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "RESULTS", tmp_path / "results.json")
    assert tasks.main(["--only", "camvid", "--data.root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'camvid'} is not there" in capsys.readouterr().err


def test_cells_are_run_once_kept_and_cleaned_up_and_a_failure_is_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(task_cells, "NORMALIZERS", (("gn", 1),))
    small = {
        "config": "embedded_segments",
        "data.train_images": 4,
        "data.test_images": 2,
        "evaluations": 1,
        "images_per_step": 2,
    }
    for name, changes in (("camvid", {}), ("bccd", {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30})):
        problem = task_cells.Problem(
            name=name,
            folder=None,
            about="tiny",
            caution="",
            figures=("miou",),
            images=4,
            seeds=1,
            seconds=1.0,
            settings=small | changes,
        )
        monkeypatch.setitem(task_cells.PROBLEMS, name, problem)
    words = ["--only", "camvid", "bccd", "--out", str(tmp_path / "out"), "--processes", "1"]
    assert tasks.main(words) == 0
    assert capsys.readouterr().out.startswith("2 cells to do, about 0.0 hours with 1 at a time")
    records = kept(tmp_path / "results.json")
    done, failed = (records[f"{name}-gn-1-seed0"] for name in ("camvid", "bccd"))
    assert 0 <= done["summary"]["test_miou"] <= 1
    assert done["summary"]["peak_memory_bytes"] > 0
    assert done["command_seconds"] > done["summary"]["seconds"]
    assert "loss" in failed["summary"]["failed"]
    assert ended(tmp_path / "out" / "camvid-gn-1-seed0")
    assert not (tmp_path / "out" / "camvid-gn-1-seed0" / "checkpoints").exists()
    assert tasks.main(words) == 0
    assert capsys.readouterr().out == "0 cells to do, about 0.0 hours with 1 at a time\n"


def record(normalizer: str, size: int, seed: int, miou: float) -> dict:
    summary = {"test_miou": miou, "test_pixel_accuracy": 0.8, "peak_memory_bytes": 2**30}
    return {
        "problem": "camvid",
        "normalizer": normalizer,
        "images_per_forward": size,
        "seed": seed,
        "summary": summary,
    }


def test_tables_have_differences_from_bn_at_two_and_say_what_failed():
    broken = record("frozen-bn", 1, 0, 0.0) | {"summary": {"failed": "the loss is nan"}}
    found = [
        record("bn", 2, 0, 0.30),
        record("bn", 2, 1, 0.32),
        record("gn+ws", 1, 0, 0.40),
        record("gn+ws", 1, 1, 0.44),
        broken,
    ]
    (table,) = task_tables({str(index): each for index, each in enumerate(found)})
    control, better, failed = table[4:7]
    assert control == "| `bn` | 2 | 2 | 31.0 ± 1.4 | 80.0 ± 0.0 | control | 1,024 |"
    assert better.startswith("| `gn+ws` | 1 | 2 | 42.0 ± 2.8 | 80.0 ± 0.0 | +11.0 (-1.7..+23.7) |")
    assert failed == "| `frozen-bn` | 1 | 0, and 1 failed: the loss is nan |  |  |  |  |"


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_was_published_stands_in_a_table_of_its_own_without_our_numbers(name):
    found = record("gn", 1, 0, 0.5) | {"problem": name}
    found["summary"] |= {f"test_{figure}": 0.5 for figure in PROBLEMS[name].figures}
    (lines,) = task_tables({"x": found})
    begin = next(index for index, line in enumerate(lines) if line.startswith("Published on "))
    assert PROBLEMS[name].caution in lines[:begin]
    assert "50.0" in "".join(lines[:begin])
    assert "50.0" not in "".join(lines[begin:])
    rows = PUBLISHED[name].rows
    assert len([line for line in lines[begin:] if line.startswith("| ")]) == (len(rows) + 1 if rows else 0)


def test_published_rows_have_a_figure_for_each_column():
    assert PUBLISHED.keys() == PROBLEMS.keys()
    for table in PUBLISHED.values():
        assert all(len(row.figures) == len(table.words) for row in table.rows)
