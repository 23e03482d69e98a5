"""Inference after `fold`, against a network that had plain group normalization from the start."""

from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import nn

import batchless as bl
from bench.timing import Clock, Comparison, Contestant, Target, interleave

REPEATS = 20
IMAGE_SIZE = 224

TARGETS = tuple(Target(of=f"{name}, folded", base="gn", at_most=1.02) for name in ("gn+ws", "bcn-micro+ws"))


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """The one comparison; see the module."""
    torch.manual_seed(seed)
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    model = torchvision.models.resnet50().eval()
    models = {"bn": model, "gn": bl.convert(model, "gn", example=image)[0]}
    for name in ("gn+ws", "bcn-micro+ws"):
        converted, _ = bl.convert(model, name, example=image)
        models[name] = converted
        models[f"{name}, folded"] = bl.fold(converted)
    yield Comparison(
        title=f"ResNet-50 inference, one {IMAGE_SIZE} px image",
        base="gn",
        times=interleave(
            {name: forward(model, image) for name, model in models.items()},
            repeats=repeats or REPEATS,
            seed=seed,
            clock=clock,
            on_round=on_round,
        ),
        targets=TARGETS,
    )


def forward(model: nn.Module, image: torch.Tensor) -> Contestant:
    """One forward without gradients."""

    def run() -> None:
        with torch.inference_mode():
            model(image)

    return run
