import json
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from batchless import commands
from batchless.arguments import parse_arguments
from batchless.cli import main
from batchless.demo import DemoConfig
from batchless.federated import run_federation
from batchless.models import build_model
from batchless.runs import load_checkpoint
from batchless.tasks import TrainConfig, run_training
from small_data import write_idx, write_pictures

SMALL = shlex.split("--images 16 --images_per_step 4 --evaluations 2 --data.image_size 8 --data.crop_padding 0")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in a new folder that has small pictures in `pictures`; tables may be wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_pictures(tmp_path / "pictures")


def train(*words: str) -> list[str]:
    return ["train", "--data.root", "pictures", *SMALL, *words]


@pytest.fixture
def complaint(capsys):
    """Run the command, which must fail with status 2 and one line on standard error: that line."""

    def run(*words: str) -> str:
        assert main(words) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("batchless: ")
        assert errors.endswith("\n")
        assert len(errors.splitlines()) == 1, errors
        return errors.removeprefix("batchless: ").strip()

    return run


def printed(capsys, *words: str) -> str:
    """What the command prints before it ends with status 0, as `--help` does."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_help_names_the_verbs(capsys):
    text = printed(capsys, "--help")
    assert all(verb in text for verb in ("train", "demo", "compare", "--version"))


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("train", ["--config", "--print_config", "--normalizer", "--data.root", "--optimizer.learning_rate"]),
        ("demo", ["--out", "--normalizers", "--seeds", "--train.model", "--train.data.image_size"]),
        ("compare", ["folders", "--out"]),
    ],
)
def test_help_of_each_verb_names_its_flags(capsys, verb, flags):
    text = printed(capsys, verb, "--help")
    assert all(flag in text for flag in flags)


def test_version(capsys):
    assert printed(capsys, "--version") == f"batchless {metadata.version('batchless')}\n"


def test_train_and_compare(capsys, tmp_path):
    for normalizer in ("gn", "gn+ws"):
        assert main(train("--normalizer", normalizer, "--out", f"runs/{normalizer}")) == 0
        output = capsys.readouterr()
        assert output.err == ""
        summary = json.loads(Path(f"runs/{normalizer}/summary.json").read_text())
        assert f"test accuracy {100 * summary['test_accuracy']:.1f} %" in output.out
        assert f"run folder runs/{normalizer}" in output.out
    assert main(["compare", "runs/gn", "runs/gn+ws", "--out", "pages/report.html"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert str(tmp_path / "pages" / "report.html") in output.out
    page = Path("pages/report.html").read_text()
    for normalizer in ("gn", "gn+ws"):
        assert normalizer in output.out
        assert normalizer in page
    assert "batchless compare runs/gn runs/gn+ws --out pages/report.html" in page


def test_the_installed_command():
    command = [str(Path(sys.executable).parent / "batchless"), *train("--threads", "1")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "test accuracy" in done.stdout
    assert "runs/cifar_resnet8-bcn-micro+ws-1-seed0" in done.stdout
    environment = json.loads(Path("runs/cifar_resnet8-bcn-micro+ws-1-seed0/environment.json").read_text())
    assert environment["command"].endswith("batchless train --data.root pictures " + " ".join([*SMALL, "--threads 1"]))
    assert environment["torch_threads"] == 1


def weights(run: str) -> dict:
    return load_checkpoint(Path(run) / "checkpoints" / "last.pt")["model"]


def test_a_printed_configuration_and_that_of_a_run_reproduce_it(capsys):
    words = train("--normalizer", "gn()+ws", "--optimizer.warmup", "0.25", "--out", "first")
    Path("printed.yaml").write_text(printed(capsys, *words, "--print_config"))
    assert not Path("first").exists()
    assert main(words) == 0
    assert main(["train", "--config", "printed.yaml", "--out", "second"]) == 0
    assert main(["train", "--config", "first/config.yaml", "--out", "third"]) == 0
    assert main(["train", "--config", "first/config.yaml", "--out", "other", "--seed", "1"]) == 0
    for run in ("second", "third"):
        assert all(torch.equal(value, weights("first")[name]) for name, value in weights(run).items())
        configs = [yaml.safe_load(Path(name, "config.yaml").read_text()) | {"out": ""} for name in ("first", run)]
        assert configs[0] == configs[1]
    assert not torch.equal(weights("other")["conv1.weight"], weights("first")["conv1.weight"])


def test_a_recipe_is_named_without_its_path_and_later_words_win():
    for words in (["--config", "embedded_quick"], ["--config=embedded_quick"]):
        config = parse_arguments(["train", *words, "--images", "64", "--normalizer=gn"])
        assert isinstance(config, TrainConfig)
        assert (config.model, config.images, config.normalizer) == ("cifar_resnet8", 64, "gn")


def test_a_file_goes_before_a_recipe_of_its_name():
    Path("embedded_quick").write_text("images: 77\n")
    assert parse_arguments(["train", "--config", "embedded_quick"]).images == 77


def test_lists_of_the_demo_are_parsed():
    config = parse_arguments(["demo", "--normalizers", "[bn, gn(groups=4)+ws]", "--images_per_forward=[1, 8]"])
    assert isinstance(config, DemoConfig)
    assert config.normalizers == ("bn", "gn(groups=4)+ws")
    assert config.images_per_forward == (1, 8)


def test_null_is_none_and_numbers_are_what_they_look_like():
    words = ["--threads", "null", "--optimizer.learning_rate", "1e-3", "--data.train_images", "40", "--out", "2024"]
    config = parse_arguments(["train", *words])
    assert config.threads is None
    assert config.optimizer.learning_rate == 1e-3
    assert config.data.train_images == 40
    assert config.out == "2024"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["no command", "demo, train, federate, compare"]),
        ("trian", ["unknown command 'trian'", "did you mean train?", "demo, train, federate, compare"]),
        ("--verion", ["unknown command '--verion'", "did you mean --version?"]),
        ("train --normalizr gn", ["unknown flag --normalizr", "did you mean --normalizer?", "batchless train --help"]),
        ("train --norm gn", ["unknown flag --norm", "did you mean --normalizer?"]),
        ("train --data.rot=x", ["unknown flag --data.rot", "did you mean --data.root?"]),
        ("demo --train.imgs 3", ["unknown flag --train.imgs", "did you mean --train.images?", "batchless demo --help"]),
        ("compare runs --outt x", ["unknown flag --outt", "did you mean --out?"]),
        ("train extra", ["extra"]),
        ("train --images", ["--images", "expected one argument"]),
        ("compare", ["required", "folders"]),
        ("train --images many", ["images got many", "a whole number"]),
        ("train --images 1.5", ["images got 1.5", "a whole number"]),
        ("train --data.train_images few", ["data.train_images got few", "a whole number or null"]),
        ("train --optimizer.learning_rate fast", ["optimizer.learning_rate got fast", "a number"]),
        ("train --data.flip 5", ["data.flip got 5", "true or false"]),
        ("train --optimizer.name lion", ["optimizer.name got lion", "one of sgd, adamw"]),
        ("demo --normalizers gn", ["normalizers got gn", "a list such as [gn, gn+ws]"]),
        ("demo --images_per_forward [a]", ["images_per_forward got a", "a list of whole numbers"]),
        ("train --data nothing.yaml", ["data got nothing.yaml:", "root, image_size", "YAML file"]),
        ("train --normalizer gnn", ["unknown normalization 'gnn'", "did you mean 'gn'?", "bcn-micro", "ws, sws"]),
        ("train --normalizer gn+wz", ["'wz'", "did you mean 'ws'?"]),
        ("train --normalizer gn(grops=2)", ["gn has no setting 'grops=2'", "did you mean 'groups'?"]),
        ("train --model timm:resnet81", ["unknown model 'timm:resnet81'", "timm:resnet18", "torchvision:<name>"]),
        ("train --model cifar_resnet9", ["6 n + 2", "got 9"]),
        ("train --images_per_forward 3", ["images_per_step=32 must be a multiple of images_per_forward=3"]),
        ("train --data.root nowhere", ["nowhere does not exist", "CIFAR pickles", "IDX files", "image folders"]),
        ("train --data.root pictures/train", ["pictures/train holds no known layout", "image folders"]),
        ("train --weights nothing.pt", ["there is no checkpoint nothing.pt"]),
        ("train --config nothing", ["no file 'nothing'", "the recipes are bccd_fasterrcnn_resnet18, "]),
        ("train --config embedded_quik", ["did you mean embedded_quick?"]),
        ("train --config pictures", ["cannot read pictures", "directory"]),
        ("train --device gpu", ["device must be cpu, cuda", "'gpu'"]),
        ("train --optimizer.warmup 2", ["optimizer.warmup", "got 2"]),
        ("demo --normalizers [gn,gnn]", ["unknown normalization 'gnn'"]),
        ("demo --images_per_forward [3]", ["images_per_step=32 must be a multiple of images_per_forward=3"]),
        ("demo --train.seed 3", ["train.seed", "set seeds instead"]),
        ("demo --out pictures", ["pictures exists already", "--out"]),
        ("compare nowhere", ["nowhere is no folder"]),
        ("compare pictures", ["no run folder in pictures", "config.yaml"]),
    ],
)
def test_a_mistake_is_one_line_with_what_is_possible(complaint, words, parts):
    line = complaint(*words.split())
    for part in parts:
        assert part in line, line
    assert "<class '" not in line
    assert "Parser key" not in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model: [1\n: x", ["given.yaml:2", "not YAML"]),
        (bytes(range(256)), ["given.yaml", "not YAML"]),
        (b"- 1\n- 2\n", ["given.yaml", "normalizer: gn+ws", "a list"]),
        (b"just words", ["given.yaml", "a str"]),
        (b"", ["given.yaml", "NoneType"]),
        (b"normalizr: gn\n", ["unknown setting 'normalizr'", "did you mean normalizer?"]),
        (b"data:\n  rot: x\n", ["unknown setting 'data.rot'", "did you mean data.root?"]),
        (b"images: many\n", ["images got many", "a whole number"]),
        (b"optimizer:\n  schedule: linear\n", ["optimizer.schedule got linear", "one of cosine, step, poly, constant"]),
        (b"data: 5\n", ["data got 5", "root, image_size"]),
        (b"data: null\n", ["data got null", "root, image_size"]),
        (b"normalizer: null\n", ["normalizer got null", "a text"]),
        (b"optimizer:\n  learning_rate: -1\n", ["optimizer.learning_rate must be above 0"]),
    ],
)
def test_a_mistake_in_a_file_is_one_line(complaint, content, parts):
    Path("given.yaml").write_bytes(content)
    line = complaint("train", "--config", "given.yaml")
    for part in parts:
        assert part in line, line


def test_a_mistake_in_a_file_of_one_group_is_named(complaint):
    Path("data.yaml").write_text("image_size: big\n")
    assert complaint("train", "--data", "data.yaml") == "data.image_size got big: expected a whole number"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(complaint):
    assert complaint(*train("--device", "cuda")).startswith("device=cuda, but this machine has no CUDA devices")


def test_a_checkpoint_of_another_network(complaint):
    torch.save(build_model("cifar_resnet14", num_classes=2).state_dict(), "other.pt")
    line = complaint(*train("--weights", "other.pt"))
    assert "other.pt is a checkpoint of another network" in line
    assert "the same model name" in line
    assert not Path("runs").exists()


def test_an_unreadable_image(complaint):
    broken = Path("pictures/test/lying/0002.png")
    broken.write_bytes(b"no picture")
    line = complaint(*train("--out", "run"))
    assert line.startswith(f"{broken}: cannot be read as an image")
    assert json.loads(Path("run/summary.json").read_text()) == {"failed": line}
    assert Path("run/checkpoints/last.pt").exists()


def test_a_label_out_of_range(complaint):
    root = write_idx(Path("digits"))
    (root / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 16] + [0] * 15 + [10]))
    line = complaint("train", "--data.root", "digits")
    assert "train-labels-idx1-ubyte: label 10 of image 15 is out of range, there are 10 classes (0 to 9)" in line


def test_an_invalid_loss(complaint):
    words = ["--optimizer.learning_rate", "1e38", "--optimizer.warmup", "0", "--out", "run"]
    line = complaint(*train(*words))
    assert "NaN or infinite within" in line
    assert "lower optimizer.learning_rate (now 1e+38)" in line
    assert json.loads(Path("run/summary.json").read_text()) == {"failed": line}


def test_a_folder_in_use(complaint):
    assert main(train("--out", "run")) == 0
    assert complaint(*train("--out", "run")).startswith("run already holds a run (config.yaml); go on")


def test_a_file_where_the_run_folder_should_be(complaint):
    Path("taken").write_text("")
    assert "cannot make the run folder taken" in complaint(*train("--out", "taken/run"))


@pytest.mark.parametrize("verb", ["train", "demo", "compare"])
def test_ctrl_c(capsys, monkeypatch, verb):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("run_training", "run_demo", "find_runs"):
        monkeypatch.setattr(commands, name, interrupted)
    assert main([verb, "runs"] if verb == "compare" else [verb]) == 130
    assert capsys.readouterr().err == "batchless: stopped\n"


def test_a_bug_is_not_taken_for_a_mistake(monkeypatch):
    def bug(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(commands, "run_training", bug)
    with pytest.raises(TypeError, match="a bug"):
        main(train())


def test_a_stopped_run_says_how_to_go_on_and_does(monkeypatch, capsys):
    def stop_soon(config, on_progress, *, should_stop):
        calls = iter(range(1000))
        return run_training(config, on_progress, should_stop=lambda: next(calls) >= 1)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "run_training", stop_soon)
        assert main(train("--out", "run")) == 130
    errors = capsys.readouterr().err
    assert errors == "batchless: stopped after 8 images, all saved; go on with: batchless train --resume run\n"
    assert main(["train", "--resume", "run"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert json.loads(Path("run/summary.json").read_text())["images"] == 16


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--resume nowhere", ["nowhere is no folder", "batchless train"]),
        ("--resume", ["--resume got no value"]),
        ("--resume run --images 5", ["leave out --images", "--device"]),
        ("--resum run", ["unknown flag --resum", "did you mean --resume?"]),
    ],
)
def test_a_mistake_in_resuming(words, parts, complaint):
    message = complaint("train", *shlex.split(words))
    for part in parts:
        assert part in message


@pytest.fixture
def checkpoint() -> str:
    assert main(train("--out", "run", "--tensorboard", "false")) == 0
    return "run/checkpoints/best.pt"


def test_the_verbs_of_a_checkpoint(checkpoint, capsys):
    pictures = sorted(map(str, Path("pictures/test").rglob("*.png")))
    capsys.readouterr()
    assert main(["evaluate", checkpoint]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["predict", checkpoint, *pictures[:2]]) == 0
    assert Path(pictures[0]).name in capsys.readouterr().out
    Path("broken.png").write_bytes(b"no image")
    assert main(["predict", checkpoint, pictures[0], "broken.png"]) == 1
    assert main(["export", checkpoint, "--format", "torch", "--out", "folded.pt"]) == 0
    assert Path("folded.pt").exists()
    assert "folded.pt" in capsys.readouterr().out


def test_doctor_and_convert(capsys):
    assert main(["doctor", "cifar_resnet8", "--image_size", "32"]) == 1
    assert "batchless.convert(" in capsys.readouterr().out
    assert main(["convert", "cifar_resnet8", "gn+ws", "--image_size", "32"]) == 0
    assert "WSConv2d" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "predict", "export", "doctor", "convert"])
def test_what_is_not_there_is_one_line(verb, complaint):
    words = {"predict": ["nowhere.pt", "a.png"], "doctor": ["timm:resnet5"], "convert": ["timm:resnet5", "gn"]}
    message = complaint(verb, *words.get(verb, ["nowhere.pt"]))
    assert "nowhere.pt" in message or "did you mean" in message


@pytest.mark.usefixtures("checkpoint")
def test_the_formats_of_a_comparison(capsys, complaint):
    capsys.readouterr()
    assert main(["compare", "run", "--format", "json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["compare", "run", "--format", "markdown"]) == 0
    assert capsys.readouterr().out.startswith("# ")
    for name, begin in (("report.html", "<!doctype html>"), ("report.md", "# "), ("report.json", "{")):
        assert main(["compare", "run", "--out", name]) == 0
        assert Path(name).read_text().lower().startswith(begin)
    assert "give it a name by --out" in complaint("compare", "run", "--format", "html")
    assert "end it in" in complaint("compare", "run", "--out", "report.pdf")
    assert "gn" in complaint("compare", "run", "--out", "report.md", "--control", "gn")


def test_federate_explains_runs_and_resumes(capsys, monkeypatch):
    words = ["federate", "--rounds", "2", "--data.images_per_client", "20", "--data.domains", "[plain, fonts]"]
    words += ["--images_per_step", "20", "--tensorboard", "false", "--workers", "1"]
    assert main([*words, "--explain"]) == 0
    assert "statistic" in capsys.readouterr().out

    def stop_soon(config, on_round, *, should_stop, on_start):
        calls = iter(range(1000))
        return run_federation(config, on_round, should_stop=lambda: next(calls) >= 3, on_start=on_start)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "run_federation", stop_soon)
        assert main([*words, "--out", "run"]) == 130
    assert "batchless federate --resume run" in capsys.readouterr().err
    assert main(["federate", "--resume", "run"]) == 0
    assert "fonts" in capsys.readouterr().out
    assert json.loads(Path("run/summary.json").read_text())["images"] == 80
    assert main(["compare", "run", "--out", "report.html"]) == 0


def test_a_federated_run_is_no_training_and_the_reverse(complaint, capsys):
    assert main(train("--out", "run", "--tensorboard", "false")) == 0
    capsys.readouterr()
    Path("run/summary.json").unlink()
    assert "of no federated run" in complaint("federate", "--resume", "run")
    assert "unknown flag --algoritm (did you mean --algorithm?)" in complaint("federate", "--algoritm", "fedbn")
