"""Activation memory against time on ResNet-50 with one 224 px image.

`batchless.lean` at every level, a checkpoint around each block, and torch's activation memory budget under compile. All of
them inside an optimizer step as `batchless.accumulate` makes it: standardized weights are there, estimates stand still.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

import batchless as bl
from bench.compilation import attempt, backend_name, compiled, kept_by_graph
from bench.saved import saved_bytes, stand_still
from bench.step import Forward
from bench.timing import Clock, Comparison, Contestant, Target, Times, interleave

REPEATS = 10
IMAGE_SIZE = 224
NORMALIZERS = ("bn", "bcn-micro+ws")

BUDGETS = (1.0, 0.5, 0.2)
"""Of the activations that compiled code keeps by itself."""

TARGETS = (
    Target(of="lean 1", base="plain", at_most=1.05),
    Target(of="lean 2", base="plain", at_most=1.15),
    Target(of="lean 3", base="checkpoint per block", at_most=1.0),
)
BYTE_TARGETS = (
    Target(of="lean 1", base="plain", at_most=0.83),
    Target(of="lean 2", base="plain", at_most=0.55),
    Target(of="lean 3", base="checkpoint per block", at_most=1.0),
)
PUBLISHED = (
    "published, not run here: InPlace-ABN (arXiv 1712.02616) keeps 50 % of BatchNorm's activations for 0.8 to 2 % time; "
    "it wants activations that can be inverted, and is exact up to rounding"
)


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """Forward and backward, BatchNorm and micro-batch BCN, by every contestant."""
    image, target = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(1000, (1,))
    for normalizer in NORMALIZERS:
        torch.manual_seed(seed)
        model, _ = bl.convert(torchvision.models.resnet50(), normalizer, example=image)
        models = contestants(model.train())
        budgeted = {f"compiled, budget {budget:g}": (budget, copy.deepcopy(model)) for budget in BUDGETS}
        others = [contestant for contestant in models.values() if contestant is not model]
        others += [copied for _, copied in budgeted.values()]
        with bl.standardized(model):  # so that nobody's bytes hold standardized weights: they are not activations
            share_weights(model, others)
            stand_still([model, *others])
            saved = {name: saved_bytes(contestant, image) for name, contestant in models.items()}
            steps = {
                name: forward_backward(contestant, contestant, image, target) for name, contestant in models.items()
            }
            notes, activations = [], dict(saved)
            for name, (budget, copied) in budgeted.items():
                forward = compiled(copied, budget=budget)
                step = forward_backward(copied, forward, image, target)
                seconds, failure = attempt(step)
                if failure:
                    notes.append(f"{name}: left out after {seconds:.0f} s, {failure}")
                    continue
                activations[name], weights = kept_by_graph(forward(image), copied)
                saved[name] = activations[name] + weights
                steps[name] = step
                notes.append(
                    f"{name}: {backend_name()}, compiled in {seconds:.0f} s; {weights / 2**20:.1f} MiB of what it keeps "
                    "are weights in another layout"
                )
            times = interleave(steps, repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round)
            share_weights(None, others)
        yield Comparison(
            title=f"ResNet-50 {normalizer}, forward and backward of one {IMAGE_SIZE} px image",
            base="plain",
            times=times,
            targets=TARGETS,
            byte_targets=BYTE_TARGETS,
            saved_bytes=saved,
            notes=(*notes, PUBLISHED, *dominated(times, saved, activations)),
        )


def dominated(times: Times, saved: Mapping[str, int], activations: Mapping[str, int]) -> list[str]:
    """What keeps less in less time than each lean level, by minima: of all that is kept, and of activations alone."""

    def better(level: str, kept: Mapping[str, int]) -> str:
        found = [name for name in times if kept[name] < kept[level] and min(times[name]) < min(times[level])]
        return f"dominated by {', '.join(found)}" if found else "not dominated"

    levels = [name for name in times if name.startswith("lean")]
    return [
        f"{level}: {better(level, saved)}; counting activations alone {better(level, activations)}" for level in levels
    ]


def contestants(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of `model`: as it is, at every lean level, and with a checkpoint around each bottleneck."""
    checkpointed = copy.deepcopy(model)
    for module in checkpointed.modules():
        if isinstance(module, Bottleneck):
            run: Any = functools.partial(checkpoint, module.forward, use_reentrant=False)
            module.forward = run  # type: ignore[method-assign]
    lean = {f"lean {level}": bl.lean(model, level)[0] for level in (1, 2, 3)}
    return {"plain": model, **lean, "checkpoint per block": checkpointed}


def share_weights(model: nn.Module | None, others: Iterable[nn.Module]) -> None:
    """Let the others compute with the standardized weights that `model` holds; None: with their own again."""
    for other in others:
        for name, module in other.named_modules():
            if hasattr(module, "shared_weight"):
                source: Any = None if model is None else model.get_submodule(name)
                module.shared_weight = None if source is None else source.shared_weight


def forward_backward(model: nn.Module, forward: Forward, image: Tensor, target: Tensor) -> Contestant:
    """One forward and backward pass; the gradients of `model` are dropped."""

    def run() -> None:
        torch.autograd.backward(F.cross_entropy(forward(image), target))
        model.zero_grad()

    return run
