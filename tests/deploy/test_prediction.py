import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from batchless.data.augment import centred
from batchless.data.folders import read_image
from batchless.data.statistics import normalized
from batchless.deploy import PredictConfig, image_files, predict_checkpoint, predict_images, prediction_table
from batchless.nn import Reparameterized
from batchless.tasks import load_trained

THREE = ("lying", "standing", "[red]neither[/red]")


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    return path


def test_probabilities_are_those_of_the_runs_evaluation(checkpoint, tmp_path):
    trained = load_trained(checkpoint(classes=THREE, data={"resize_shorter_side": 36}))
    Image.new("RGB", (90, 50), (200, 30, 90)).save(tmp_path / "wide.png")
    files = [tmp_path / "wide.png", tmp_path / "pictures" / "test" / "lying" / "0000.png"]
    found = list(predict_images(trained, files))
    for file, prediction in zip(files, found, strict=True):
        square = centred(read_image(file), 32, resize_to=36)
        with torch.no_grad():
            expected = trained.model(normalized(square[None], trained.statistics)).softmax(1)[0]
        assert prediction.file == str(file)
        assert [name for name, _ in prediction.classes] == [THREE[label] for label in expected.argsort(descending=True)]
        assert [share for _, share in prediction.classes] == pytest.approx(sorted(expected.tolist())[::-1], abs=1e-5)
    assert found[0].classes != found[1].classes
    assert all(len(prediction.classes) == 1 for prediction in predict_images(trained, files, top=1))


def test_an_unreadable_image_is_told_in_its_place(checkpoint, broken, tmp_path):
    trained = load_trained(checkpoint())
    image = tmp_path / "pictures" / "test" / "lying" / "0000.png"
    files = [broken, *[image] * 40, tmp_path / "missing.png", image]  # more than one forward
    found = list(predict_images(trained, files))
    assert [prediction.file for prediction in found] == [str(file) for file in files]
    assert [number for number, prediction in enumerate(found) if prediction.error] == [0, 41]
    assert found[0].error.startswith(f"{broken}: cannot be read as an image (")
    assert found[0].classes == ()
    assert found[41].error.startswith(f"{tmp_path / 'missing.png'}: cannot be read as an image (")
    names, shares = zip(*(zip(*found[number].classes, strict=True) for number in (*range(1, 41), 42)), strict=True)
    assert len(set(names)) == 1
    # The same image, the same probabilities; kernels depend on how many images there are.
    assert np.ptp(shares, axis=0).max() < 1e-6
    assert found[41].classes == ()
    assert [prediction.error is None for prediction in predict_images(trained, [broken])] == [False]


def test_weights_are_standardized_once_and_given_back(checkpoint, monkeypatch, pictures):
    trained = load_trained(checkpoint())
    layers = [module for module in trained.model.modules() if isinstance(module, Reparameterized)]
    computed = []
    for kind in {type(layer) for layer in layers}:
        real = kind.reparameterized_weight
        monkeypatch.setattr(kind, "reparameterized_weight", lambda self, real=real: computed.append(1) or real(self))
    predictions = predict_images(trained, image_files([pictures / "test" / "lying"]) * 10)
    next(predictions)
    assert torch.is_grad_enabled()  # between two images too
    assert all(layer.shared_weight is not None for layer in layers)
    assert len(list(predictions)) == 39
    assert len(computed) == len(layers) > 0
    assert all(layer.shared_weight is None for layer in layers)


def test_folders_stand_for_the_images_directly_in_them(tmp_path, pictures, broken):
    folder = tmp_path / "mine"
    (folder / "below").mkdir(parents=True)
    image = pictures / "test" / "lying" / "0000.png"
    for name in ("b.PNG", "a.png", ".hidden.png", "notes.txt", "below/c.png"):
        shutil.copy(image, folder / name)
    assert image_files([broken, folder, str(image)]) == [broken, folder / "a.png", folder / "b.PNG", image]
    with pytest.raises(ValueError, match=r"pictures: no image directly in this folder \(looked for .*\.jpg"):
        image_files([pictures])


def test_the_lines_that_are_written(checkpoint, pictures, broken, tmp_path):
    folder, out = pictures / "test" / "standing", tmp_path / "out.jsonl"
    config = PredictConfig(checkpoint=str(checkpoint()), images=(str(folder), str(broken)), top=5, out=str(out))
    predictions = predict_checkpoint(config)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == [*(str(file) for file in sorted(folder.iterdir())), str(broken)]
    assert lines[-1] == {"file": str(broken), "error": predictions[-1].error}
    for line, prediction in zip(lines[:-1], predictions, strict=False):
        assert [(told["class"], told["probability"]) for told in line["predictions"]] == list(prediction.classes)
        assert sum(told["probability"] for told in line["predictions"]) == pytest.approx(1, abs=1e-5)


def test_the_table_shows_names_as_they_are(checkpoint, pictures, broken):
    trained = load_trained(checkpoint(classes=THREE))
    files = [pictures / "test" / "lying" / "0000.png", broken]
    file = io.StringIO()
    Console(width=250, file=file).print(prediction_table(list(predict_images(trained, files, top=3))))
    shown = file.getvalue()
    assert "[red]neither[/red]" in shown
    assert shown.count(" %") == 3
    assert shown.count(str(files[0])) == 1
    assert "cannot be read as an image" in shown


def test_settings_that_cannot_be(checkpoint, pictures):
    with pytest.raises(ValueError, match="top must be 1 or more classes, got 0"):
        PredictConfig(checkpoint="x", images=("y",), top=0)
    path, image = str(checkpoint()), str(pictures / "test" / "lying" / "0000.png")
    with pytest.raises(ValueError, match="device must be cpu, cuda, or cuda:<number>, got 'gpu'"):
        predict_checkpoint(PredictConfig(checkpoint=path, images=(image,), device="gpu"))
    with pytest.raises(ValueError, match="top must be 1 or more"):
        list(predict_images(load_trained(path), [image], top=0))


def test_a_device_that_is_not_there(checkpoint, pictures, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = PredictConfig(checkpoint=str(checkpoint()), images=(str(pictures / "test" / "lying"),), device="cuda:1")
    with pytest.raises(ValueError, match=r"this machine has no CUDA devices: use device=cpu"):
        predict_checkpoint(config)
