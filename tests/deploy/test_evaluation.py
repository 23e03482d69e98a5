import io
import json

import pytest
import torch
from rich.console import Console

from batchless.data import first_images, open_images
from batchless.deploy import EvaluateConfig, evaluate_checkpoint, evaluation_tables, predict_images
from batchless.deploy.classification import by_class, with_classes
from batchless.deploy.evaluation import EvaluationData
from batchless.tasks import DataSettings, TrainConfig, load_trained, run_training
from small_data import CLASSES, write_idx, write_pictures


def evaluated(path, **data) -> dict:
    return evaluate_checkpoint(EvaluateConfig(checkpoint=str(path), data=EvaluationData(**data)))


def test_the_figures_are_those_of_the_run(tmp_path, pictures):
    data = DataSettings(root=str(pictures), image_size=8, resize_shorter_side=10, crop_padding=0, test_images=6)
    config = TrainConfig(
        images=16,
        images_per_step=4,
        evaluations=1,
        precision="bf16",
        data=data,
        tensorboard=False,
        out=str(tmp_path / "run"),
    )
    finished = run_training(config)
    found = evaluated(finished.folder / "checkpoints" / "last.pt")
    assert found["images"] == 6
    assert found["accuracy"] == finished.summary["test_accuracy"]
    assert found["loss"] == finished.summary["test_loss"]
    assert found["root"] == str(pictures)


def test_classes_and_confusions_agree_with_the_predictions_of_single_images(checkpoint, pictures, tmp_path):
    path, out = checkpoint(), tmp_path / "figures.json"
    trained = load_trained(path)
    images = open_images(pictures, "test")
    predicted = [
        prediction.classes[0][0]
        for prediction in predict_images(trained, [images.source(index) for index in range(len(images))])
    ]
    found = evaluate_checkpoint(EvaluateConfig(checkpoint=str(path), out=str(out)))
    pairs = [(CLASSES[images.label(index)], predicted[index]) for index in range(len(images))]
    assert found["accuracy"] == sum(truth == guess for truth, guess in pairs) / 8
    for row in found["per_class"]:
        own = [guess for truth, guess in pairs if truth == row["class"]]
        assert row["images"] == len(own) == 4
        assert row["accuracy"] == own.count(row["class"]) / 4
    assert {(row["truth"], row["predicted"]): row["images"] for row in found["confusions"]} == {
        pair: pairs.count(pair) for pair in pairs if pair[0] != pair[1]
    }
    assert json.loads(out.read_text()) == found


def test_another_root_with_the_same_classes(checkpoint, tmp_path):
    path = checkpoint(data={"test_images": 2})
    other = write_pictures(tmp_path / "other", test=20, size=32)
    assert evaluated(path)["images"] == 2
    found = evaluated(path, root=str(other))
    assert (found["images"], found["root"]) == (20, str(other))
    assert evaluated(path, root=str(other), workers=1) == found


def test_other_classes_are_named(checkpoint, tmp_path):
    path = checkpoint()
    other = write_pictures(tmp_path / "other")
    for split in ("train", "test"):
        (other / split / "lying").rename(other / split / "leaning")
    with pytest.raises(
        ValueError, match=r"1 that the run has not \(leaning\); 1 of the run's missing \(lying\); name its folders"
    ):
        evaluated(path, root=str(other))
    write_idx(tmp_path / "idx")
    with pytest.raises(ValueError, match=r"10 that the run has not|that the run has not \("):
        evaluated(path, root=str(tmp_path / "idx"))
    with pytest.raises(ValueError, match=r"other2 does not exist"):
        evaluated(path, root=str(tmp_path / "other2"))


def test_labels_follow_the_runs_order_of_classes(checkpoint, pictures):
    """The same network with its outputs exchanged, and their names too, is the same network."""
    found = evaluated(checkpoint())

    def exchange(network: torch.nn.Module) -> None:
        for parameter in network.fc.parameters():
            parameter.data = parameter.data.flip(0)

    torch.manual_seed(0)
    other = evaluated(checkpoint(classes=CLASSES[::-1], change=exchange))
    assert other["per_class"] == found["per_class"][::-1]
    assert other["loss"] == pytest.approx(found["loss"], rel=1e-5)
    images = open_images(pictures, "test")
    turned = with_classes(images, CLASSES[::-1])
    assert len(turned) == len(images)
    assert [turned.label(index) for index in range(8)] == [1 - images.label(index) for index in range(8)]
    assert torch.equal(turned.image(3), images.image(3))
    assert turned.source(3) == images.source(3)
    assert with_classes(images, CLASSES) is images


def test_the_embedded_images(checkpoint):
    path = checkpoint(classes=tuple("0123456789"), data={"root": None, "test_images": 30})
    found = evaluated(path)
    images = first_images(open_images(None, "test"), 30, seed=0)
    assert found["root"] is None
    assert [row["images"] for row in found["per_class"]] == [
        sum(images.label(index) == label for index in range(30)) for label in range(10)
    ]
    assert len(found["confusions"]) <= 10
    counts = [row["images"] for row in found["confusions"]]
    assert counts == sorted(counts, reverse=True)


def test_an_unreadable_image_is_named(checkpoint, pictures):
    path, image = checkpoint(), pictures / "test" / "lying" / "0002.png"
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0002\.png: cannot be read as an image"):
        evaluated(path)


def shown(**figures) -> str:
    file = io.StringIO()
    totals = {"task": "classify", "accuracy": 2 / 3, "loss": 0.5, "images": 3, "root": "[red]data"}
    Console(width=120, file=file).print(evaluation_tables(totals | figures))
    return file.getvalue()


def test_the_tables_show_names_as_they_are():
    text = shown(**by_class([0, 0, 1], [0, 1, 1], ("[bold]a[/bold]", "b", "nobody")))
    assert text.startswith("accuracy 66.7 %, loss 0.500, on 3 test images of [red]data\n")
    assert text.count("[bold]a[/bold]") == 2
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert cells == [
        ["[bold]a[/bold]", "2", "50.0"],
        ["b", "1", "100.0"],
        ["nobody", "0", "-"],
        ["[bold]a[/bold]", "b", "1"],
    ]
    assert "taken for" in text
    right = shown(**by_class([0], [0], ("a",)), root=None)
    assert "test images of the embedded handwriting\n" in right
    assert "taken for" not in right


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"data\.workers must be 0 or more, got -1"):
        EvaluationData(workers=-1)
