import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import batchless as bl
from batchless.data import IMAGENET_STATISTICS, epoch_order, open_images
from batchless.models import build_model
from batchless.runs import load_checkpoint, load_model_state, read_run
from batchless.tasks import Classify, DataSettings, TrainConfig, classify_setup, experiment, run_training
from batchless.tasks.setup import set_up
from batchless.train import OptimizerSettings, evaluate
from small_data import write_cifar10, write_idx, write_pictures


def small(tmp_path, *, data=None, **changes) -> TrainConfig:
    """Sixteen images on the pictures that `write_pictures` has made in `tmp_path / "pictures"`."""
    data = {"root": str(tmp_path / "pictures"), "image_size": 8, "crop_padding": 0} | (data or {})
    values = {"images": 16, "images_per_step": 4, "evaluations": 2, "out": str(tmp_path / "run"), **changes}
    return TrainConfig(data=DataSettings(**data), **values)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def test_the_embedded_data_from_start_to_end(tmp_path):
    config = TrainConfig(images=48, out=str(tmp_path / "run"), evaluations=2, data=DataSettings(test_images=30))
    shown = []
    trained = run_training(config, lambda images, figures: shown.append(images))
    assert trained.folder == tmp_path / "run"
    assert shown[-1] == 48
    run = read_run(trained.folder)
    assert run.summary == trained.summary
    assert 0 <= run.summary["test_accuracy"] <= 1
    assert TrainConfig.from_plain(run.config, source="config.yaml") == config
    assert run.environment["seed"] == 0
    assert (trained.folder / "conversion.txt").read_text() == f"{trained.conversion}\n"
    assert sum(entry.now == "WSConv2d" for entry in trained.conversion.replaced) == 9

    torch.manual_seed(99)
    model, _ = bl.convert(build_model(config.model, num_classes=10), config.normalizer)
    checkpoint = load_checkpoint(trained.folder / "checkpoints" / "last.pt")
    load_model_state(model, checkpoint["model"], source="last.pt")
    figures = evaluate(model, Classify(), set_up(config).data).compute()
    assert {f"test_{name}": value for name, value in figures.items()}.items() <= trained.summary.items()


def test_a_lean_training_has_the_same_bits(tmp_path, pictures):
    states = []
    for level in (0, 2):
        run = run_training(small(tmp_path, lean=level, out=str(tmp_path / f"lean{level}")))
        assert run.summary["peak_memory_bytes"] > 0
        states.append(load_checkpoint(run.folder / "checkpoints" / "last.pt")["model"])
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    with pytest.raises(ValueError, match="lean level must be 0, 1, 2 or 3, got 5"):
        small(tmp_path, lean=5)


@pytest.mark.parametrize("write", [write_pictures, write_cifar10, write_idx], ids=lambda write: write.__name__)
def test_the_layouts_on_disk(tmp_path, write):
    root = write(tmp_path / "data")
    classes = open_images(root, "train").classes
    trained = run_training(small(tmp_path, data={"root": str(root), "image_size": 16}))
    state = load_checkpoint(trained.folder / "checkpoints" / "last.pt")["model"]
    assert len(state["fc.weight"]) == len(classes)
    assert trained.summary["images"] == 16


def test_it_learns(tmp_path):
    """Stripes lying or standing: chance is one half."""
    write_pictures(tmp_path / "pictures", train=64, test=40)
    optimizer = OptimizerSettings(learning_rate=0.05)
    config = small(tmp_path, images=384, images_per_step=16, evaluations=1, normalizer="gn+ws", optimizer=optimizer)
    assert run_training(config).summary["test_accuracy"] > 0.9


@pytest.mark.usefixtures("pictures")
def test_a_run_is_reproduced_by_its_seed_and_its_configuration(tmp_path):
    first = run_training(small(tmp_path))
    given = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert given["normalizer"] == "bcn-micro+ws"
    again = run_training(TrainConfig.from_plain(given | {"out": str(tmp_path / "again")}, source="config.yaml"))
    other = run_training(small(tmp_path, seed=1, out=str(tmp_path / "other")))
    states = [load_checkpoint(run.folder / "checkpoints" / "last.pt")["model"] for run in (first, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


@pytest.mark.usefixtures("pictures")
def test_it_starts_from_the_weights_of_an_unconverted_network(tmp_path):
    torch.manual_seed(7)
    start = build_model("cifar_resnet8", num_classes=2)
    torch.save(start.state_dict(), tmp_path / "plain.pt")
    torch.save({"model": start.state_dict(), "images": 5}, tmp_path / "checkpoint.pt")
    optimizer = OptimizerSettings(learning_rate=1e-12)
    for name in ("plain", "checkpoint"):
        config = small(tmp_path, weights=str(tmp_path / f"{name}.pt"), out=str(tmp_path / name), optimizer=optimizer)
        state = load_checkpoint(run_training(config).folder / "checkpoints" / "last.pt")["model"]
        torch.testing.assert_close(state["conv1.weight"], start.conv1.weight.detach())


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("kind", ["pt", "safetensors", "wrapped"])
def test_fine_tuning_with_other_classes_takes_all_but_the_classifier(tmp_path, kind):
    torch.manual_seed(7)
    state = build_model("cifar_resnet8", num_classes=5).state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        prefix = "module." if kind == "wrapped" else ""
        torch.save({f"{prefix}{name}": value for name, value in state.items()}, path)
    finished = run_training(small(tmp_path, weights=str(path), optimizer=OptimizerSettings(learning_rate=1e-12)))
    taken = load_checkpoint(finished.folder / "checkpoints" / "last.pt")["model"]
    torch.testing.assert_close(taken["conv1.weight"], state["conv1.weight"])
    assert taken["fc.weight"].shape[0] == 2
    assert finished.notes == (
        f"{len(state) - 2} tensors of {path.name} were loaded into the network before its conversion",
        f"fc.weight, fc.bias of {path.name} are for 5 classes, not 2: the classifier starts at random",
    )
    assert finished.notes[1] in (finished.folder / "conversion.txt").read_text()
    assert json.loads((finished.folder / "conversion.json").read_text())["weights"] == list(finished.notes)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: build_model("cifar_resnet14", num_classes=2).state_dict(), "checkpoint of another network"),
        (lambda: {"model": 5}, "checkpoint of another network"),
        (lambda: bl.convert(build_model("cifar_resnet8", num_classes=2), "gn+ws")[0].state_dict(), "another network"),
    ],
)
def test_weights_of_another_network_are_refused_before_anything_is_written(tmp_path, state, message):
    torch.save(state(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message) as caught:
        run_training(small(tmp_path, weights=str(tmp_path / "other.pt")))
    assert "other.pt" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "cifar_resnet9"}, "depth"),
        (
            {"model": "torchvision:squeezenet1_1", "data": {"image_size": 32}},
            r"^torchvision:squeezenet1_1 has nothing that bcn-micro\+ws replaces: choose a network with batch norm",
        ),
        (
            {"model": "timm:vit_tiny_patch16_224"},
            r"^timm:vit_tiny_patch16_224 does not run on 8x8 images \(.*\): choose another data\.image_size or model$",
        ),
        ({"data": {"root": "/nowhere/at/all"}}, "^/nowhere/at/all does not exist"),
        ({"data": {"train_images": 17}}, "^data.train_images: n=17 images: the dataset has 16"),
        ({"data": {"test_images": 1}}, "^data.test_images: n=1 images: .*give 2 to 8$"),
        ({"weights": "/nowhere/last.pt"}, "there is no checkpoint /nowhere/last.pt"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_training(small(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": "gnn"}, r"unknown normalization 'gnn' .*did you mean 'gn'"),
        ({"images_per_forward": 3}, r"^images_per_step=32 must be a multiple of images_per_forward=3$"),
        ({"images": 0}, r"^images must be 1 or more, got 0$"),
        ({"seed": -1}, r"^seed must be from 0 to 2\*\*63 - 1, got -1$"),
        ({"threads": 0}, r"^threads must be 1 or more, .*got 0$"),
        ({"device": "gpu"}, r"^device must be cpu, cuda, or cuda:<number>, got 'gpu'$"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_size", 0), ("crop_padding", -1), ("train_images", 0), ("test_images", 0), ("workers", -1)],
)
def test_a_data_setting_out_of_range_is_refused_at_once(name, value):
    with pytest.raises(ValueError, match=rf"^data\.{name} must be {value + 1} or more, got {value}$"):
        DataSettings(**{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match=f"^device={device}, but this machine has no CUDA devices: use device=cpu$"):
        run_training(small(tmp_path, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("pictures")
def test_cuda(tmp_path):
    assert run_training(small(tmp_path, device="cuda")).summary["images"] == 16


def failed_run(config: TrainConfig, message: str) -> None:
    """Run it, expecting that it fails with that message and says so in its folder."""
    with pytest.raises(ValueError, match=message) as caught:
        run_training(config)
    summary = json.loads((config.folder() / "summary.json").read_text())
    assert summary == {"failed": str(caught.value)}
    assert "\n" not in summary["failed"]


@pytest.mark.usefixtures("pictures")
def test_an_invalid_loss_leaves_a_failed_run(tmp_path):
    # The first step of a warm-up has a rate of 0; the next ones throw the weights out of range.
    optimizer = OptimizerSettings(learning_rate=1e38, warmup=0.5)
    failed_run(
        small(tmp_path, optimizer=optimizer, evaluations=4), "NaN or infinite within .*lower optimizer.learning_rate"
    )
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert 0 < checkpoint["images"] < 16
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_an_unreadable_image_in_mid_epoch_leaves_a_failed_run_and_what_was_done(tmp_path, pictures, monkeypatch):
    # The channel statistics read 500 images: of a larger set an unreadable one is met only when its turn comes.
    monkeypatch.setattr(classify_setup, "channel_statistics", lambda *_, **__: IMAGENET_STATISTICS)
    last = open_images(pictures, "train").source(epoch_order(16, seed=0, epoch=0)[-1])
    Path(last).write_bytes(Path(last).read_bytes()[:60])
    failed_run(small(tmp_path), f"^{last}: cannot be read as an image .*; replace or remove this file$")
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["images"] == 8
    kinds = [record["kind"] for record in read_run(tmp_path / "run").metrics]
    assert "test" in kinds


def test_an_unreadable_test_image_leaves_the_checkpoint_before_it(tmp_path, pictures):
    broken = pictures / "test" / "standing" / "0003.png"
    broken.write_bytes(b"no picture")
    failed_run(small(tmp_path), f"^{broken}: cannot be read as an image")
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["images"] == 8


@pytest.mark.usefixtures("pictures")
def test_another_error_is_recorded_and_passed_on(tmp_path, monkeypatch):
    def without_memory(*_, **__):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(experiment, "train", without_memory)
    with pytest.raises(RuntimeError, match="out of\nmemory"):
        run_training(small(tmp_path))
    assert read_run(tmp_path / "run").summary == {"failed": "RuntimeError: out of memory"}


@pytest.mark.usefixtures("pictures")
def test_a_folder_that_holds_a_run_is_left_as_it_is(tmp_path):
    config = small(tmp_path, images=4, evaluations=1)
    run_training(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"run already holds a run \(config.yaml\); go on .* or choose another folder, such as .*run-2"
    ):
        run_training(config)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_folder_is_named_after_model_normalizer_size_and_seed():
    folder = TrainConfig(model="timm:resnet18", normalizer="gn() + ws", seed=3).folder()
    assert str(folder) == "runs/timm-resnet18-gn+ws-1-seed3"


@pytest.mark.parametrize(("name", "size"), [("cifar10", 32), ("mnist", 28)])
def test_the_real_data_sets(tmp_path, real_data, name, size):
    root = real_data / name
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    data = {"root": str(root), "image_size": size, "train_images": 40, "test_images": 20}
    trained = run_training(small(tmp_path, images=40, images_per_step=20, data=data))
    assert trained.summary["images"] == 40
    state = load_checkpoint(trained.folder / "checkpoints" / "last.pt")["model"]
    assert len(state["fc.weight"]) == 10
