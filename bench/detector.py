"""Whole optimizer steps of Mask R-CNN R-50-FPN with one 512 px image and fixed proposals.

The region proposal network runs and is trained, but what it proposes is replaced by the same boxes for all contestants:
their own proposals would differ in number, and the time with it. Its sampling of anchors stays, a fixed number of them.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchvision.models.detection import maskrcnn_resnet50_fpn

import batchless as bl
from bench.formulas import AuthorsBatchChannelNorm, authors_conv, with_layers
from bench.timing import Clock, Comparison, Contestant, Target, interleave

REPEATS = 10
IMAGE_SIZE = 512
PROPOSALS = 512
OBJECTS = 8
RATE = 0.01

TARGETS = (
    Target(of="gn+ws, accumulate", base="gn, accumulate", at_most=1.08),
    Target(of="bcn-micro+ws, accumulate", base="bn, plain loop", at_most=1.12),
    Target(of="bcn-micro+ws, accumulate", base="authors' bcn + ws, plain loop", at_most=0.5),
)

Objects = dict[str, Tensor]


class FixedProposals(nn.Module):
    """A region proposal network whose losses are its own and whose proposals are `boxes` `[P, 4]` in every image."""

    def __init__(self, network: nn.Module, boxes: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("boxes", boxes)

    def forward(self, images: Any, features: Any, targets: Any = None) -> tuple[list[Any], Any]:
        """As the network's own."""
        _, losses = self.network(images, features, targets)
        return [self.boxes] * len(targets), losses


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """The one comparison; see the module."""
    torch.manual_seed(seed)
    image, objects, proposals = scene()
    model: Any = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=IMAGE_SIZE,
        max_size=IMAGE_SIZE,
        norm_layer=nn.BatchNorm2d,
    )
    model.rpn = FixedProposals(model.rpn, proposals)
    authors = with_layers(
        model.backbone.body,
        {nn.Conv2d: authors_conv, nn.BatchNorm2d: lambda norm: AuthorsBatchChannelNorm(norm.num_features, rate=RATE)},
    )
    theirs = copy.deepcopy(model)
    theirs.backbone.body = authors
    steps = {
        "bn, plain loop": plain_step(model, image, objects),
        "authors' bcn + ws, plain loop": plain_step(theirs, image, objects),
    }
    for name in ("gn", "gn+ws", "bcn-micro+ws"):
        steps[f"{name}, accumulate"] = accumulated_step(bl.convert(model, name)[0], image, objects)
    yield Comparison(
        title=f"Mask R-CNN R-50-FPN optimizer step, one {IMAGE_SIZE} px image, {PROPOSALS} fixed proposals",
        base="bn, plain loop",
        times=interleave(steps, repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round),
        targets=TARGETS,
    )


def scene() -> tuple[Tensor, Objects, Tensor]:
    """A random image, its objects, and proposals."""
    objects = {
        "boxes": random_boxes(OBJECTS),
        "labels": torch.randint(1, 91, (OBJECTS,)),
        "masks": torch.randint(2, (OBJECTS, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8),
    }
    # Near the objects or anywhere: the stage samples up to a quarter of positives, as in training.
    near = objects["boxes"].repeat(PROPOSALS // (2 * OBJECTS), 1)
    near = (near + 8 * torch.randn_like(near)).clamp(0, IMAGE_SIZE)
    return torch.rand(3, IMAGE_SIZE, IMAGE_SIZE), objects, torch.cat([near, random_boxes(PROPOSALS - len(near))])


def random_boxes(count: int, *, image_size: int = IMAGE_SIZE) -> Tensor:
    """`[count, 4]` of an eighth to three eighths of the image a side."""
    corner = torch.rand(count, 2) * (image_size * 5 / 8)
    return torch.cat([corner, corner + image_size / 8 + image_size / 4 * torch.rand(count, 2)], 1)


def plain_step(model: nn.Module, image: Tensor, objects: Objects) -> Contestant:
    """Forward, backward, step."""
    model.train()
    optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        torch.manual_seed(0)  # of the samplers
        torch.autograd.backward(total(model([image], [objects])))
        optimizer.step()
        optimizer.zero_grad()

    return run


def accumulated_step(model: nn.Module, image: Tensor, objects: Objects) -> Contestant:
    """The same through `batchless.accumulate`."""
    model.train()
    optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        torch.manual_seed(0)
        with bl.accumulate(model, optimizer) as step:
            step.backward(total(model([image], [objects])), samples=1)

    return run


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of a detector's losses."""
    return torch.stack(list(losses.values())).sum()
