import dataclasses
import os
import shlex
from pathlib import Path

import pytest

from batchless.cli import main
from batchless.demo import DemoConfig, pool, run_demo
from batchless.demo.config import FEDERATION
from batchless.federated import FederateConfig
from batchless.runs import RunFolder, find_runs, read_run
from batchless.tasks import DataSettings, TrainConfig
from small_data import write_pictures

SMALL = TrainConfig(images=64, evaluations=1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def ignore(what: str, done: float, total: int) -> None:
    """Show nothing."""


class EndsItsProcess:
    """A function that ends the process into which it is unpickled, as the kernel does where memory is short."""

    def __reduce__(self):
        return os._exit, (1,)


def test_two_processes_end_in_a_page_that_tells_what_failed(capsys):
    """Images of 4x4 are maps of 1x1 at the end of the network: batch statistics of one image are of one value there."""
    write_pictures(Path("pictures"))
    words = shlex.split(
        "demo --images_per_forward [1,2] --normalizers [bn,gn] --processes 2 --train.images 64 --train.evaluations 1 "
        "--train.data.root pictures --train.data.image_size 4 --train.data.crop_padding 0 --out out"
    )
    assert main(words) == 0
    output = capsys.readouterr().out
    page = Path("out/report.html")
    assert str(page.resolve()) in output
    text = page.read_text()
    runs = {(run.config["normalizer"], run.config["images_per_forward"]): run for run in find_runs("out")}
    assert set(runs) == {("bn", 1), ("bn", 2), ("gn", 1), ("gn", 2)}
    failed = {key for key, run in runs.items() if "failed" in run.summary}
    assert failed == {("bn", 1)}
    reason = runs["bn", 1].summary["failed"]
    assert "Expected more than 1 value per channel" in reason
    for place in (text, " ".join(output.split())):
        assert "Expected more than 1 value per channel" in place
        for key in set(runs) - failed:
            assert f"{100 * runs[key].summary['test_accuracy']:.1f}" in place
    assert "batchless demo --images_per_forward" in text
    for run in runs.values():
        assert run.environment["torch_threads"] == 1
        assert run.config["images"] == 64


def test_both_halves_are_on_one_page(capsys):
    """One image of 1x1 values per step: FedAvg's BatchNorm fails on every client, FedWon has none."""
    write_pictures(Path("pictures"))
    for domain in ("left", "right"):
        write_pictures(Path("domains") / domain)
    words = shlex.split(
        "demo --normalizers [gn] --images_per_forward [2] --processes 2 --train.images 64 --train.evaluations 1 "
        "--train.data.root pictures --train.data.image_size 8 --federated true --algorithms [fedavg,fedwon] "
        "--federate.rounds 2 --federate.data.root domains --federate.data.image_size 4 --federate.images_per_step 1 --out out"
    )
    assert main(words) == 0
    output = " ".join(capsys.readouterr().out.split())
    text = Path("out/report.html").read_text()
    federated = {run.config["algorithm"]: run for run in find_runs("out") if run.config.get("kind") == "federate"}
    assert set(federated) == {"fedavg", "fedwon"}
    assert "0 of 2 clients left" in federated["fedavg"].summary["failed"]
    mean = f"{100 * federated['fedwon'].summary['test_accuracy']:.1f}"
    trained = f"{100 * read_run('out/gn-2-seed0').summary['test_accuracy']:.1f}"
    for place in (text, output):
        assert mean in place
        assert trained in place
        assert "0 of 2 clients left" in place
        assert "Mean test accuracy over 2 domains" in place
    assert "one image per forward, one domain per client" in text
    assert "2 federated runs of 2 rounds each over domains" in output


def test_progress_counts_what_is_done_of_runs_that_go_on(tmp_path):
    train, federate = (kind(out=str(tmp_path / name)) for kind, name in ((TrainConfig, "a"), (FederateConfig, "b")))
    assert pool._share(train) == pool._share(federate) == 0
    for run, line in ((train, {"images": train.images // 4}), (federate, {"round": federate.rounds // 2})):
        folder = RunFolder.create(run.folder(), config={}, seed=0, tensorboard=False)
        folder.log({"kind": "train", **line})
        folder.release()
    assert pool._share(train) == pytest.approx(0.25, abs=1e-3)
    assert pool._share(federate) == 0.5


def test_progress_ends_with_every_run(tmp_path):
    write_pictures(tmp_path / "pictures")
    train = dataclasses.replace(SMALL, data=DataSettings(root="pictures", image_size=8))
    config = DemoConfig(normalizers=("gn",), images_per_forward=(1, 2), train=train, processes=1)
    seen: list[tuple[str, float, int]] = []
    run_demo(config, lambda *progress: seen.append(progress), commands=["batchless demo"])
    done = [each[1] for each in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] == 2
    assert "gn at" in seen[-1][0]


def test_the_federated_half_has_every_algorithm_once_with_one_thread():
    config = DemoConfig(seeds=2, out="there")
    runs = config.federated_runs()
    assert [(run.algorithm, run.seed) for run in runs] == [
        (algorithm, seed) for algorithm in ("fedavg", "fedbn", "fedwon") for seed in (0, 1)
    ]
    assert len({run.out for run in [*runs, *config.runs()]}) == 6 + len(config.runs())
    assert {(run.threads, run.workers, run.folder().parent) for run in runs} == {(1, 1, Path("there"))}
    assert {run.resolved_normalizer() for run in runs} == {"bn", "none+sws"}
    own = {"algorithm", "seed", "threads", "workers", "out"}
    for run in runs:
        for item in dataclasses.fields(run):
            assert item.name in own or getattr(run, item.name) == getattr(FEDERATION, item.name)


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({}, 3),
        ({"federated": False}, 0),
        ({"train": TrainConfig(task="detect")}, 0),
        ({"train": TrainConfig(task="video")}, 0),
        ({"train": TrainConfig(data=DataSettings(root="mine"))}, 0),
        ({"train": TrainConfig(data=DataSettings(root="mine")), "federated": True, "algorithms": ("fedwon",)}, 1),
    ],
)
def test_the_federated_half_is_of_the_embedded_demo_unless_asked_for(given, number):
    assert len(DemoConfig(**given).federated_runs()) == number


def test_a_wrong_setting_is_told_once_and_nothing_is_written(capsys):
    write_pictures(Path("pictures"))
    settings = "--normalizers [gn] --images_per_forward [1] --processes 1 --train.data.root pictures"
    assert main(["demo", *shlex.split(settings), "--train.model", "cifar_resnt8"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("batchless: unknown model 'cifar_resnt8' (did you mean cifar_resnet8")
    assert errors.count("\n") == 1
    assert not Path("runs").exists()


def test_a_process_that_is_ended_from_outside_is_told(monkeypatch):
    monkeypatch.setattr(pool, "_train", EndsItsProcess())
    config = DemoConfig(normalizers=("gn",), images_per_forward=(1, 2), train=SMALL, processes=1)
    with pytest.raises(ValueError, match="ended from outside, probably for want of memory: give fewer --processes"):
        run_demo(config, ignore, commands=["batchless demo"])


def test_a_folder_that_exists_is_refused(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^runs/demo exists already: choose another folder with --out, or remove it$"):
        run_demo(DemoConfig(), ignore, commands=["batchless demo"])


def test_every_combination_is_run_once_with_one_thread_the_longest_first():
    config = DemoConfig(normalizers=("bn", "gn"), images_per_forward=(32, 1), seeds=2, train=SMALL, out="there")
    runs = config.runs()
    assert len({run.out for run in runs}) == len(runs) == 2 * 2 * 2
    assert [run.images_per_forward for run in runs] == [1] * 4 + [32] * 4
    assert {(run.normalizer, run.images_per_forward, run.seed) for run in runs} == {
        (normalizer, size, seed) for normalizer in ("bn", "gn") for size in (1, 32) for seed in (0, 1)
    }
    for run in runs:
        assert run.threads == 1
        assert run.folder().parent == Path("there")
        own = {"normalizer", "images_per_forward", "seed", "threads", "out"}
        for item in dataclasses.fields(run):
            assert item.name in own or getattr(run, item.name) == getattr(SMALL, item.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizers": ()}, r"^normalizers must be one or more different values, got \[\]$"),
        ({"normalizers": ("gn", "gn")}, r"^normalizers must be one or more different values"),
        ({"normalizers": ("gn", "gnn")}, "unknown normalization 'gnn'"),
        ({"images_per_forward": ()}, r"^images_per_forward must be one or more different values, got \[\]$"),
        ({"images_per_forward": (0,)}, r"^images_per_forward must be 1 or more, got 0$"),
        ({"images_per_forward": (1, 5)}, r"^images_per_step=32 must be a multiple of images_per_forward=5$"),
        ({"seeds": 0}, r"^seeds must be 1 or more, got 0$"),
        ({"processes": 0}, r"^processes must be 1 or more, got 0$"),
        ({"train": TrainConfig(seed=4)}, r"^train\.seed is not one for all runs here: set seeds instead$"),
        ({"train": TrainConfig(normalizer="gn")}, r"^train\.normalizer .* set normalizers instead$"),
        ({"train": TrainConfig(out="x")}, r"^train\.out .* set out instead$"),
        ({"algorithms": ()}, r"^algorithms must be one or more different values, got \[\]$"),
        ({"algorithms": ("fedbm",)}, "did you mean fedbn"),
        ({"federate": FederateConfig(algorithm="fedbn")}, r"^federate\.algorithm .* set algorithms instead$"),
        ({"federate": FederateConfig(workers=3)}, r"^federate\.workers .* set processes instead$"),
        ({"federate": FederateConfig(workers=1, engine="flower")}, r"^federate\.engine must be processes"),
    ],
)
def test_wrong_settings_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**changes)


def test_another_data_setting_is_every_runs():
    data = DataSettings(train_images=50)
    config = DemoConfig(train=dataclasses.replace(SMALL, data=data))
    assert all(run.data == data for run in config.runs())
