"""The targets of whole steps against their bases, two contestants at a time: what a restless machine needs.

A round of `bench.step` with eight images lasts half a minute for all contestants together. With the two that a target names
it lasts six seconds: several times the rounds in the same time, and what disturbs one of a pair is more likely to disturb both.
"""

from collections.abc import Callable, Iterator

import torch
import torchvision

from bench.step import IMAGE_SIZE, MICRO_BATCHES, micro_batches, plans, times_of, title
from bench.timing import Clock, Comparison

REPEATS = 100

ONE_IMAGE_REPEATS = 200
"""Where a step has one image: it is short, and its targets are near."""


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """As `bench.step`, without the contestants that no target is set against, and without the authors' formulas."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet50()
    data = micro_batches(MICRO_BATCHES, image_size=IMAGE_SIZE)
    for models, (target, *_), count in plans():
        built = models(model)
        pair = {name: built[name] for name in (target.base, target.of)}
        del built
        yield Comparison(
            title=title(count),
            base=target.base,
            times=times_of(
                pair,
                data[:count],
                repeats=repeats or (ONE_IMAGE_REPEATS if count == 1 else REPEATS),
                seed=seed,
                clock=clock,
                on_round=on_round,
            ),
            targets=(target,),
        )
