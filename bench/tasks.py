"""Training steps of the networks that `studies.tasks` trains, with each of its normalizers at its images per forward.

Sizes and images per step are the study's. Images are the embedded samples' in place of the study's files, so that loading is
no part of it and the data need not be there. Detectors get the same proposals whatever they would have proposed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from studies.running import words_of
from studies.task_cells import NORMALIZERS, PROBLEMS, Cell
from torch import nn
from torch.optim import SGD

import batchless as bl
from batchless.arguments import parse_arguments
from batchless.tasks import TrainConfig
from batchless.tasks.segment.settings import SegmentSettings
from batchless.tasks.setup import Setup, set_up
from batchless.tasks.trained import build_converted, build_plain
from bench.detector import FixedProposals, random_boxes
from bench.saved import saved_in_step
from bench.step import require_finite
from bench.timing import Clock, Comparison, Contestant, interleave

REPEATS = 20


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """One for each task."""
    for name, problem in PROBLEMS.items():
        contestants: dict[str, Contestant] = {}
        saved, models = {}, {}
        for normalizer, size in NORMALIZERS:
            config = on_embedded(Cell(name, normalizer, size, seed))
            setup: Setup[Any] = set_up(config)
            model = network(config, setup, seed=seed)
            batches = first_step(config, setup)
            title = f"{normalizer}, {size} per forward"
            contestants[title] = training_step(model, setup, batches)
            saved[title] = saved_in_step(model, batches[0], forward=setup.task.loss)
            models[title] = model
        times = interleave(contestants, repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round)
        require_finite(models)
        yield Comparison(
            title=f"{problem.about}: forward, backward and optimizer step",
            base=next(iter(contestants)),
            times=times,
            saved_bytes=saved,
            items=config.images_per_step,
            notes=("saved MiB are of one forward: with bn of two images",),
        )


def on_embedded(cell: Cell) -> TrainConfig:
    """The cell's settings, but for the embedded sample's images and classes."""
    config = parse_arguments(["train", *words_of(cell.settings())])
    assert isinstance(config, TrainConfig)
    return replace(
        config,
        images=config.images_per_step,
        data=replace(config.data, root=None),
        segment=replace(config.segment, class_names=(), ignore=SegmentSettings().ignore),
    )


def network(config: TrainConfig, setup: Setup[Any], *, seed: int) -> nn.Module:
    """The converted network, a detector with fixed proposals."""
    torch.manual_seed(seed)
    model: Any = build_converted(config, build_plain(config, num_classes=len(setup.classes)))[0].train()
    if config.task == "detect":
        side = config.detector.shorter_side
        model.rpn = FixedProposals(model.rpn, random_boxes(config.detector.proposals_per_image, image_size=side))
    whole: nn.Module = model
    return whole


def first_step(config: TrainConfig, setup: Setup[Any]) -> list[Any]:
    """The batches of the first optimizer step."""
    images = setup.data.order(0)[: config.images_per_step]
    size = config.images_per_forward
    return list(setup.data.train(0, [images[start : start + size] for start in range(0, len(images), size)]))


def training_step(model: nn.Module, setup: Setup[Any], batches: list[Any]) -> Contestant:
    """As `batchless train` makes it, by an optimizer whose rate is so small that all rounds do the same arithmetic."""
    optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        torch.manual_seed(0)  # of the samplers
        with bl.accumulate(model, optimizer) as step:
            for batch in batches:
                loss, count = setup.task.loss(model, batch)
                step.backward(loss / count, samples=count, images=setup.task.images(batch))

    return run
