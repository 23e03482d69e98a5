"""The targets of `lean` in time, two contestants at a time: what a restless machine needs.

A round of `bench.memory` lasts four seconds for all contestants together; with the two that a target names it lasts less
than one, and what disturbs one of a pair is more likely to disturb both.
"""

from collections.abc import Callable, Iterator

import torch
import torchvision

import batchless as bl
from bench.memory import IMAGE_SIZE, NORMALIZERS, TARGETS, forward_backward, share_weights
from bench.saved import stand_still
from bench.timing import Clock, Comparison, interleave

REPEATS = 150

_LEVELS = {f"lean {level}": level for level in (1, 2)}


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """As `bench.memory`, each level against the plain network alone, and no bytes."""
    torch.manual_seed(seed)
    image, target = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(1000, (1,))
    for normalizer in NORMALIZERS:
        model, _ = bl.convert(torchvision.models.resnet50(), normalizer, example=image)
        model.train()
        for name, level in _LEVELS.items():
            lean, _ = bl.lean(model, level)
            with bl.standardized(model):
                share_weights(model, [lean])
                stand_still([model, lean])
                pair = {"plain": model, name: lean}
                times = interleave(
                    {of: forward_backward(network, network, image, target) for of, network in pair.items()},
                    repeats=repeats or REPEATS,
                    seed=seed,
                    clock=clock,
                    on_round=on_round,
                )
                share_weights(None, [lean])
            yield Comparison(
                title=f"ResNet-50 {normalizer}, forward and backward of one {IMAGE_SIZE} px image",
                base="plain",
                times=times,
                targets=tuple(each for each in TARGETS if (each.of, each.base) == (name, "plain")),
            )
