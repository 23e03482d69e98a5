"""Checkpoints as `batchless train` writes them, of networks that have not learned but hold no trivial value."""

import pytest
import torch
from torch import nn

from batchless.models.example import detection_targets, is_detector
from batchless.nn import BatchChannelNorm
from batchless.runs.checkpoint import save_checkpoint
from batchless.tasks import DataSettings, TrainConfig
from batchless.tasks.trained import build_converted, build_plain, example_input
from small_data import CLASSES, write_pictures

MEAN, STD = [0.48, 0.5, 0.52], [0.21, 0.25, 0.3]


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", size=40)


@pytest.fixture
def checkpoint(tmp_path, pictures):
    """Write `run/checkpoints/best.pt` of a network, by default with two classes; its path."""

    def write(model="cifar_resnet8", normalizer="gn+ws", *, classes=CLASSES, change=None, data=None, **settings):
        squares = {"image_size": 32, "root": str(pictures)} if settings.get("task", "classify") == "classify" else {}
        data = squares | (data or {})
        config = TrainConfig(model=model, normalizer=normalizer, data=DataSettings(**data), **settings)
        network, _ = build_converted(config, build_plain(config, num_classes=len(classes)))
        _stir(network, config)
        if change is not None:
            change(network)
        path = tmp_path / "run" / "checkpoints" / "best.pt"
        state = {"model": network.state_dict(), "config": config.plain(), "classes": list(classes)}
        save_checkpoint(path, state | {"mean": MEAN, "std": STD})
        return path

    return write


def _stir(network: nn.Module, config: TrainConfig) -> None:
    """Running statistics of real activations, and gains and biases off their starting values."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.2 * torch.randn_like(parameter) + 0.1)
        for module in network.modules():
            if isinstance(module, BatchChannelNorm):
                module.batch_norm.running_mean.normal_(0, 0.2)
                module.batch_norm.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.momentum = 0.5
        network.train()
        for _ in range(2):
            (example,) = example_input(config, network)
            if is_detector(network):
                network(example, detection_targets(example))
            else:
                network(torch.randn(4, *example.shape[1:]))
