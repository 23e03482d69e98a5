"""The studies' shortcut, all micro-batches of a step in one forward, is the same arithmetic."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # studies are run from the repository root, not installed

from studies.together import together

import batchless as bl

IMAGES = 12


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()


def trained(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, images_per_forward: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with bl.accumulate(model, optimizer) as step:
            for x, y in zip(images.split(images_per_forward), labels.split(images_per_forward), strict=True):
                step.backward(nn.functional.cross_entropy(model(x), y), samples=len(x))


@pytest.mark.parametrize(
    "normalizer",
    [
        "bn",
        "bcn-micro(update=forward)+ws",
        "bcn-micro(memory=5, update=forward)",
        "bcn-micro(memory=5, update=forward, warmup=false)",
        "bcn-micro+ws",
        "gn+ws",
    ],
)
@pytest.mark.parametrize("images_per_forward", [1, 2, 3, 16])
def test_one_forward_over_a_step_equals_its_micro_batches(normalizer: str, images_per_forward: int) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (IMAGES,), generator=generator)
    apart, _ = bl.convert(small_network(), normalizer, example=images)
    at_once = together(copy.deepcopy(apart), images_per_forward)
    trained(apart.train(), images, labels, images_per_forward)
    trained(at_once.train(), images, labels, IMAGES)
    expected = apart.state_dict()
    found = {key.replace(".layer.", "."): value for key, value in at_once.state_dict().items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(at_once.eval()(images), apart.eval()(images), rtol=1e-9, atol=1e-11)


def test_a_ragged_last_micro_batch_is_refused() -> None:
    model = together(small_network(), 5)
    with pytest.raises(ValueError, match="12 images are no whole number of micro-batches of 5"):
        model(torch.zeros(IMAGES, 3, 8, 8, dtype=torch.float64))


def test_images_come_out_in_the_order_in_which_they_went_in() -> None:
    model = together(nn.Sequential(nn.Flatten()), 2)
    images = torch.arange(6.0).view(6, 1)
    torch.testing.assert_close(model(images), images)
