"""A network from its checkpoint alone."""

import pytest
import torch

from batchless.models import build_model
from batchless.runs import load_checkpoint
from batchless.runs.checkpoint import save_checkpoint
from batchless.tasks import DataSettings, TrainConfig, load_trained, run_training
from batchless.train import OptimizerSettings
from small_data import write_pictures


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def trained_in(tmp_path, **changes):
    data = DataSettings(root=str(tmp_path / "pictures"), image_size=changes.pop("image_size", 8), crop_padding=0)
    values = {"images": 16, "images_per_step": 4, "evaluations": 1, "tensorboard": False, "data": data, **changes}
    return run_training(TrainConfig(out=str(tmp_path / "run"), **values)).folder / "checkpoints" / "last.pt"


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("normalizer", ["bn", "gn+ws", "bcn-micro+ws", "none+sws"])
def test_the_network_of_any_run_comes_back(tmp_path, normalizer):
    path = trained_in(tmp_path, normalizer=normalizer, average=8.0)
    state = torch.get_rng_state()
    trained = load_trained(path)
    assert torch.equal(torch.get_rng_state(), state)
    saved = load_checkpoint(path)
    assert trained.classes == ("lying", "standing")
    assert list(trained.statistics.mean) == saved["mean"]
    assert trained.config.normalizer == normalizer
    assert not trained.model.training
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("zero", [True, False], ids=["fresh", "pretrained"])
def test_gains_that_were_zero_when_the_run_began_and_gains_that_were_not(tmp_path, zero):
    """timm's ResNets begin with zero gains, which `none` turns into SkipInit; pretrained gains are not zero."""
    weights = None
    if not zero:
        start = build_model("timm:resnet18", num_classes=2)
        for module in start.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.0)
        torch.save(start.state_dict(), tmp_path / "weights.pt")
        weights = str(tmp_path / "weights.pt")
    optimizer = OptimizerSettings(learning_rate=1e-3)
    path = trained_in(
        tmp_path, model="timm:resnet18", normalizer="none+sws", weights=weights, image_size=32, optimizer=optimizer
    )
    skip_inits = [key for key in load_checkpoint(path)["model"] if key.endswith(".gain")]
    assert bool(skip_inits) is zero
    assert set(load_trained(path).model.state_dict()) == set(load_checkpoint(path)["model"])


@pytest.mark.usefixtures("pictures")
def test_what_no_run_has_written_is_refused(tmp_path):
    path = trained_in(tmp_path)
    whole = load_checkpoint(path)
    for spoiled, message in (
        ({key: value for key, value in whole.items() if key != "classes"}, "not written by `batchless train`"),
        (whole | {"config": 5}, "damaged"),
        (whole | {"config": whole["config"] | {"colour": "red"}}, "unknown setting 'colour'"),
        (whole | {"classes": ["one", "two", "three"]}, "of another network"),
    ):
        save_checkpoint(tmp_path / "spoiled.pt", spoiled)
        with pytest.raises(ValueError, match=message) as raised:
            load_trained(tmp_path / "spoiled.pt")
        assert "spoiled.pt" in str(raised.value)
    with pytest.raises(ValueError, match="cuda"):
        load_trained(path, "cuda:99")
