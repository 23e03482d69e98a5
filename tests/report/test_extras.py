"""What a run folder may hold beside the run: derived settings, predictions, commands; missing and damaged ones."""

import base64
import json
import os

import pytest
from report_folders import conversion, png, prediction, write_pictures, write_run

from batchless.report import pictures
from batchless.report.commands import recorded_commands, repetition
from batchless.report.conversions import read_conversions
from batchless.report.likeness import varied
from batchless.report.pictures import read_galleries
from batchless.runs import read_run
from batchless.surgery import ConversionReport, Entry


@pytest.fixture
def run(tmp_path):
    return read_run(write_run(tmp_path / "run"))


def test_the_records_of_a_conversion_are_what_the_report_reads(run):
    entry = Entry(name="", action="replaced", was="BatchNorm2d", now="GroupNorm", detail="4 groups of 8")
    report = ConversionReport(normalizer="gn", found_by="example", entries=(entry,), notes=("a note",))
    (run.path / "conversion.json").write_text(json.dumps(report.records(), allow_nan=False))
    (found,), notes = read_conversions([run])
    assert notes == []
    assert (found.normalizer, found.found_by, found.runs, found.notes) == ("gn", "example", 1, ("a note",))
    (layers,) = found.layers
    assert (layers.count, layers.first, layers.now, layers.detail) == (1, "", "GroupNorm", "4 groups of 8")


def test_equal_layers_and_equal_conversions_are_told_once(tmp_path):
    runs = [read_run(write_run(tmp_path / str(seed), "gn", seed=seed)) for seed in range(3)]
    (found,), _ = read_conversions(runs)
    assert found.runs == 3
    assert [(layers.count, layers.first) for layers in found.layers] == [(1, "conv1"), (2, "bn1"), (1, "fc")]
    (runs[2].path / "conversion.json").write_text(json.dumps(conversion("gn") | {"found_by": "structure"}))
    assert [(one.found_by, one.runs) for one in read_conversions(runs)[0]] == [("example", 2), ("structure", 1)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "null", '{"entries": 3}', '{"normalizer": "gn"}', "[" * 100_000, b"\xff\xfe"]
)
def test_a_damaged_conversion_is_a_note(run, content):
    (run.path / "conversion.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found, (note,) = read_conversions([run])
    assert found == []
    assert "conversion.json" in note
    assert "\n" not in note


def test_runs_without_one_are_counted(run):
    (run.path / "conversion.json").unlink()
    assert read_conversions([run, run]) == ([], ["2 of 2 run folders have no conversion.json (failed early, or older)"])


def test_predictions_come_with_their_pictures(run):
    write_pictures(
        run.path,
        [prediction(), prediction("typical", confidence=1, picture="b.png")],
        files={"0.png": png(), "b.png": png(shade=9)},
    )
    (gallery,), notes = read_galleries([run])
    assert notes == []
    (worst,), (typical,) = gallery.kind("worst"), gallery.kind("typical")
    assert (worst.truth, worst.predicted, worst.confidence, worst.source) == ("seven", "one", 0.93, "test/7/0012.png")
    assert worst.uri == f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert typical.uri != worst.uri


def test_of_each_combination_the_first_run_that_has_any(tmp_path):
    runs = [read_run(write_run(tmp_path / f"{n}{s}", n, seed=s)) for n in ("gn", "bn") for s in range(2)]
    (runs[0].path / "pictures" / "predictions.json").unlink()
    galleries, notes = read_galleries(runs)
    assert [gallery.run for gallery in galleries] == [runs[1], runs[2]]
    assert notes == []


def test_few_of_many(run, monkeypatch):
    write_pictures(run.path, [prediction() for _ in range(1000)])
    (gallery,), notes = read_galleries([run])
    assert (len(gallery.predictions), notes) == (pictures.MOST_EACH, [])
    monkeypatch.setattr(pictures, "MOST_BYTES_IN_ALL", 2 * len(gallery.predictions[0].uri))
    (gallery,), (note,) = read_galleries([run])
    assert len(gallery.predictions) == 2
    assert "entry 3 and after are left out: the pictures would make the page too large" in note


def test_pictures_outside_the_run_folder_are_refused(run, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    os.symlink(tmp_path / "secret.png", run.path / "pictures" / "link.png")
    names = [
        "../../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "..",
        ".",
        "",
        "a\0.png",
        "gone.png",
        3,
        None,
    ]
    write_pictures(run.path, [prediction(picture=name) for name in names])
    galleries, notes = read_galleries([run])
    assert galleries == []
    assert len(notes) == len(names)
    assert all("left out" in note and "\n" not in note for note in notes)


def test_a_pictures_folder_that_leads_elsewhere_is_refused(tmp_path):
    run, other = (read_run(write_run(tmp_path / name)) for name in ("run", "other"))
    (run.path / "pictures").rename(run.path / "before")
    os.symlink(other.path / "pictures", run.path / "pictures")
    assert read_galleries([run])[0] == []


def test_other_files_than_small_pictures_are_refused(run):
    files = {"a.svg": b"<svg/>", "b.png": png() + bytes(pictures.MOST_BYTES), "c.png": b""}
    write_pictures(run.path, [prediction(picture=name) for name in files], files=files)
    galleries, notes = read_galleries([run])
    assert galleries == []
    reasons = ("neither PNG nor JPEG", "larger than 256 KiB", "neither PNG nor JPEG")
    assert all(reason in note for reason, note in zip(reasons, notes, strict=True))


@pytest.mark.parametrize(
    "entry",
    [
        3,
        [],
        {},
        prediction(kind="best"),
        prediction(kind=["worst"]),
        prediction(confidence=93),
        prediction(confidence="high"),
        {key: value for key, value in prediction().items() if key != "truth"},
    ],
)
def test_a_damaged_entry_is_a_note_and_the_others_stay(run, entry):
    write_pictures(run.path, [entry, prediction()])
    (gallery,), (note,) = read_galleries([run])
    assert len(gallery.predictions) == 1
    assert "predictions.json, entry 1 is left out: " in note


@pytest.mark.parametrize("content", ["{", "{}", "3", '"text"'])
def test_damaged_predictions_are_a_note(run, content):
    (run.path / "pictures" / "predictions.json").write_text(content)
    galleries, (note,) = read_galleries([run])
    assert galleries == []
    assert "predictions.json" in note


def test_commands_of_worker_processes_are_left_out(make_run):
    worker = "/usr/bin/python -c 'from multiprocessing.spawn import spawn_main; spawn_main()' --multiprocessing-fork"
    commands = ["batchless train", "batchless train", worker, "it's", None]
    runs = [make_run("gn", 2, 0.5, environment={"command": command}) for command in commands]
    assert recorded_commands(runs) == [("batchless train", 2), ("it's", 1)]


def test_a_repetition_survives_a_path_with_spaces(make_run, tmp_path):
    run = read_run(write_run(tmp_path / "my run"))
    assert repetition(run) == f"batchless train --config '{run.path}/config.yaml' --out '{run.path}-again'"


def test_settings_that_differ_are_told_with_their_runs(make_run):
    runs = [
        make_run("gn", 2, 0.5, config={"optimizer": {"lr": 0.1}}),
        make_run("gn", 2, 0.5, seed=1, config={"optimizer": {"lr": 0.1}, "out": "elsewhere"}),
        make_run("bn", 4, 0.5, config={"optimizer": {"lr": 0.2}, "warmup": 3}),
    ]
    assert varied(runs) == [
        ("optimizer.lr", "0.1", "gn at 2 (2 runs)"),
        ("optimizer.lr", "0.2", "bn at 4 (1 run)"),
        ("warmup", "not set", "gn at 2 (2 runs)"),
        ("warmup", "3", "bn at 4 (1 run)"),
    ]
