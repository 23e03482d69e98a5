"""What each adapter must equal: the same steps by `batchless.accumulate` in a plain loop."""

import torch
import torch.nn.functional as F
from torch import nn

import batchless as bl

NORMALIZERS = ["gn+ws", "bcn-micro+ws"]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}


class Network(nn.Sequential):
    """Two convolutions and a classifier of three classes."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
        )


def network(normalizer, dtype=torch.float64, seed=0):
    """A converted network; equal weights for equal seeds."""
    torch.manual_seed(seed)
    return bl.convert(Network(), normalizer, example=torch.randn(1, 3, 8, 8))[0].to(dtype).train()


def micro_batches(sizes, dtype=torch.float64):
    """Labelled images in micro-batches of the given sizes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def train_plainly(model, optimizer, steps, *, clip=None, loss=None):
    """One optimizer step for each list of micro-batches."""
    for step_micro_batches in steps:
        with bl.accumulate(model, optimizer, clip=clip) as step:
            for images, labels in step_micro_batches:
                mean_loss = F.cross_entropy(model(images), labels) if loss is None else loss(model, images, labels)
                step.backward(mean_loss, samples=len(images))


def assert_same_state(actual, expected, tolerance):
    """All parameters and buffers alike."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_has_trained(model, start):
    """Weights and, where there are any, estimates have moved by far more than the tolerances."""
    for name, value in start.items():
        if value.is_floating_point() and not name.endswith("memory"):
            assert (model.state_dict()[name] - value).abs().max() > 1e-4, name
