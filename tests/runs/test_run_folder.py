import errno
import json
import math
import os
from pathlib import Path, PurePosixPath

import pytest

from batchless.runs import RunFolder, find_runs, number, read_run
from batchless.runs import folder as folder_module

CONFIG = {"normalizer": "gn(groups=16)+ws", "images_per_forward": 2, "model": {"name": "resnet20"}, "lr": 1e-5}


def create(path, **changes):
    return RunFolder.create(path, config={**CONFIG, **changes}, seed=7)


def no_leftovers(path):
    return not [file for file in path.rglob("*") if file.name.endswith(".tmp")]


def test_what_is_written_is_what_is_read(tmp_path):
    run = create(tmp_path / "deep" / "run")
    run.log({"kind": "train", "images": 32, "loss": 2.5})
    run.log({"kind": "test", "images": 64, "accuracy": 0.1 + 0.2})
    run.finish({"test_accuracy": 0.5, "nested": {"per_class": [1, 2.5]}})
    back = read_run(run.path)
    assert back.config == CONFIG
    assert back.metrics == (
        {"kind": "train", "images": 32, "loss": 2.5},
        {"kind": "test", "images": 64, "accuracy": 0.1 + 0.2},
    )
    assert back.summary == {"test_accuracy": 0.5, "nested": {"per_class": [1, 2.5]}}
    assert back.path == run.path
    assert no_leftovers(tmp_path)


def test_environment_says_what_a_result_depends_on(tmp_path):
    environment = read_run(create(tmp_path / "run").path).environment
    assert environment["seed"] == 7
    assert environment["cores"] == os.cpu_count()
    assert environment["started"].endswith("+00:00")
    assert {"python", "platform", "cpu", "torch", "torchvision", "timm", "batchless", "git_commit", "command"} <= set(
        environment
    )


@pytest.mark.parametrize("text", ["none", "null", "yes", "1e-5", "0x10", "2024-01-01", "a: b", "#", "é\n", " x "])
def test_texts_in_the_configuration_stay_texts(tmp_path, text):
    assert read_run(create(tmp_path / "run", value=text).path).config["value"] == text


@pytest.mark.parametrize("value", [None, True, 3, 1e-5, 1e300, float("inf"), [1, [2.0]], {"a": {"b": []}}])
def test_plain_values_in_the_configuration_come_back(tmp_path, value):
    back = read_run(create(tmp_path / "run", value=value).path).config["value"]
    assert back == value
    assert type(back) is type(value)


def test_paths_and_tuples_in_the_configuration_become_plain(tmp_path):
    config = read_run(create(tmp_path / "run", root=Path("a/b"), sizes=(1, 2)).path).config
    assert config["root"] == "a/b"
    assert config["sizes"] == [1, 2]


def test_a_configuration_that_yaml_cannot_give_back_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"config\.optimizer\[1\] is a object"):
        create(tmp_path / "run", optimizer=["sgd", object()])
    with pytest.raises(ValueError, match=r"config\.root is a PurePosixPath"):
        create(tmp_path / "run", root=PurePosixPath("a"))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_and_left_as_it_was(tmp_path):
    create(tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(
        ValueError, match=r"run already holds a run \(config.yaml\); go on with it by --resume .*run, or .*run-3"
    ):
        create(tmp_path / "run", lr=1.0)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_an_existing_folder_without_a_run_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert read_run(create(tmp_path).path).config == CONFIG
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the run folder .*run: .*choose another folder"):
        create(tmp_path / "run")


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_the_files_stay_strict_json(tmp_path, value, text):
    run = create(tmp_path / "run")
    run.log({"loss": value})
    run.finish({"test_accuracy": value, "more": [value]})
    assert json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {"loss": text}
    summary = json.loads((run.path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == {"test_accuracy": text, "more": [text]}


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    run = create(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the metric 'loss' is a list.*\.item\(\)"):
        run.log({"loss": [1.0]})
    assert read_run(run.path).metrics == ()


def test_a_line_that_did_not_fit_on_the_disk_is_taken_back(tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, line):
            self.file.write(line[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    run = create(tmp_path / "run")
    run.log({"images": 1})
    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: FullDisk(real(self, *a, **k)))
        with pytest.raises(ValueError, match=r"cannot append to .*metrics\.jsonl: No space left on device"):
            run.log({"images": 2})
    run.log({"images": 3})
    assert read_run(run.path).metrics == ({"images": 1}, {"images": 3})


def test_a_summary_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    run = create(tmp_path / "run")
    run.finish({"test_accuracy": 0.25})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*summary\.json: No space left on device; .*unchanged"):
        run.finish({"test_accuracy": 0.75})
    assert read_run(run.path).summary == {"test_accuracy": 0.25}
    assert no_leftovers(tmp_path)


def test_new_files_are_as_readable_as_any_other_file(tmp_path):
    (tmp_path / "plain").write_text("")
    run = create(tmp_path / "run")
    run.finish({})
    expected = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in run.path.iterdir()} == {expected}


def test_number():
    assert number(3) == 3.0
    assert number(0.5) == 0.5
    assert [number(value) for value in ("nan", None, True, math.nan, math.inf, 10**400, [1])] == [None] * 7


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path):
    run = create(tmp_path / "run")
    run.log({"images": 1})
    run.log({"images": 2})
    file = run.path / "metrics.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        file.write_bytes(whole[:end])
        expected = ({"images": 1}, {"images": 2}) if end == len(whole) - 1 else ({"images": 1},)
        assert read_run(run.path).metrics == expected


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (b"{]\n", r"metrics\.jsonl:2: not JSON"),
        (b"[1]\n", r"metrics\.jsonl:2: holds a list"),
        (b'{"loss": NaN}\n', r"metrics\.jsonl:2: not JSON: NaN is not strict JSON"),
        (b'{"loss": "\xff"}\n', r"metrics\.jsonl:2: not JSON"),
        (b"\n", r"metrics\.jsonl:2: not JSON"),
        (b'{"half": \n{"images": 3}\n', r"metrics\.jsonl:2: not JSON"),
        (b"[" * 100_000 + b"\n", r"metrics\.jsonl:2: not JSON"),
    ],
)
def test_damage_anywhere_else_is_named_with_file_and_line(tmp_path, damage, what):
    run = create(tmp_path / "run")
    run.log({"images": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(ValueError, match=what) as caught:
        read_run(run.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("config.yaml", "a: [1\nb: 2\n", r"config\.yaml:2: not YAML"),
        ("config.yaml", "- 1\n", r"config\.yaml:1: holds a list"),
        ("config.yaml", "", r"config\.yaml:1: holds a NoneType"),
        ("config.yaml", "a: !!python/object/apply:os.getcwd []\n", r"config\.yaml:1: not YAML"),
        ("config.yaml", "a: \x00\n", r"config\.yaml:1: not YAML"),
        ("environment.json", '{\n "a": 1,\n}', r"environment\.json:3: not JSON"),
        ("summary.json", "", r"summary\.json:1: not JSON"),
        ("summary.json", "3", r"summary\.json:1: holds a int"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, name, content, what):
    run = create(tmp_path / "run")
    (run.path / name).write_text(content)
    with pytest.raises(ValueError, match=what) as caught:
        read_run(run.path)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run \(no config\.yaml\); give a folder"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        read_run(tmp_path / "nowhere")
    create(tmp_path / "run")
    (tmp_path / "run" / "environment.json").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*environment\.json: No such file"):
        read_run(tmp_path / "run")


def test_find_runs_reads_all_in_the_order_they_were_started(tmp_path, monkeypatch):
    for name, started in (("z/first", "2026-01-01"), ("a", "2026-01-02"), ("b/c/third", "2026-01-03")):
        monkeypatch.setattr(folder_module, "describe_environment", lambda *, seed, at=started: {"started": at})
        create(tmp_path / name)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "config.yaml").write_text("not: a run")
    names = [str(run.path.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert names == ["z/first", "a", "b/c/third"]
    assert [run.path for run in find_runs(tmp_path / "a")] == [tmp_path / "a"]
    assert find_runs(tmp_path / "recipes") == []
    with pytest.raises(ValueError, match="is no folder"):
        find_runs(tmp_path / "nowhere")


def test_a_run_holds_no_runs(tmp_path):
    create(tmp_path / "run")
    create(tmp_path / "run" / "checkpoints" / "copied")
    assert [run.path for run in find_runs(tmp_path)] == [tmp_path / "run"]


def test_who_is_reading_a_file_while_it_is_replaced_reads_all_of_the_old_one(tmp_path):
    run = create(tmp_path / "run")
    run.finish({"test_accuracy": 0.25})
    checkpoint = run.save_checkpoint("last", {"images": 1})
    summary = run.path / "summary.json"
    old = summary.read_bytes(), checkpoint.read_bytes()
    with summary.open("rb") as reading_summary, checkpoint.open("rb") as reading_checkpoint:
        run.finish({"test_accuracy": 0.75})
        run.save_checkpoint("last", {"images": 2})
        assert (reading_summary.read(), reading_checkpoint.read()) == old
    assert read_run(run.path).summary == {"test_accuracy": 0.75}
    assert checkpoint.read_bytes() != old[1]


def test_a_process_stopped_just_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    run = create(tmp_path / "run")
    run.finish({"test_accuracy": 0.25})

    def stopped(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            run.finish({"test_accuracy": 0.75})
    assert read_run(run.path).summary == {"test_accuracy": 0.25}
    assert no_leftovers(tmp_path)
