"""Whole optimizer steps of ResNet-50 with one 224 px image per micro-batch: forward, backward, SGD step."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import SGD

import batchless as bl
from bench.formulas import AuthorsBatchChannelNorm, authors_conv, timm_conv, with_layers
from bench.saved import saved_in_step
from bench.timing import Clock, Comparison, Contestant, Target, Times, interleave

REPEATS = 10
MICRO_BATCHES = 8
IMAGE_SIZE = 224

RATE = 0.01
"""Of the authors' estimates; as published it is 0, which takes as long and moves nothing."""

BCN_BYTES = (Target(of="bcn-micro+ws, accumulate", base="bn, plain loop", at_most=1.01),)
"""What one forward keeps; standardized weights count only where each forward makes its own, as the others do."""

MicroBatches = Sequence[tuple[Tensor, Tensor]]
Forward = Callable[[Tensor], Tensor]


def plans() -> Iterator[tuple[Callable[[nn.Module], "Models"], tuple[Target, ...], int]]:
    """What makes the contestants, what is asked of them, the comparison's base first, and the micro-batches of a step."""
    for count, gn_at_most, bcn_at_most in ((1, 1.08, 1.12), (MICRO_BATCHES, 1.03, 1.06)):
        yield gn_models, (Target(of="gn+ws, accumulate", base="gn, accumulate", at_most=gn_at_most),), count
        ours = "bcn-micro+ws, accumulate"
        of_bn = Target(of=ours, base="bn, plain loop", at_most=bcn_at_most)
        yield bcn_models, (of_bn, Target(of=ours, base="authors' bcn + ws, plain loop", at_most=0.5)), count


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """GN with and without WS, then BN and BCN: at 1 micro-batch per step, and at 8."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet50()
    data = micro_batches(MICRO_BATCHES, image_size=IMAGE_SIZE)
    for models, targets, count in plans():
        built = models(model)
        saved = {name: saved_in_step(contestant, data[0][0]) for name, (_, contestant) in built.items()}
        yield Comparison(
            title=title(count),
            base=targets[0].base,
            times=times_of(built, data[:count], repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round),
            targets=targets,
            byte_targets=BCN_BYTES if models is bcn_models else (),
            saved_bytes=saved,
        )


def title(count: int) -> str:
    """One line, for so many micro-batches in a step."""
    return f"ResNet-50 optimizer step, micro-batches of one {IMAGE_SIZE} px image, {count} per step"


def times_of(
    built: "Models",
    images: MicroBatches,
    *,
    repeats: int,
    seed: int,
    clock: Clock,
    on_round: Callable[[int, int], None],
) -> Times:
    """Times of whole steps of each network, none of which diverged."""
    contestants = {name: step(contestant, images) for name, (step, contestant) in built.items()}
    times = interleave(contestants, repeats=repeats, seed=seed, clock=clock, on_round=on_round)
    require_finite({name: contestant for name, (_, contestant) in built.items()})
    return times


def micro_batches(count: int, *, image_size: int) -> list[tuple[Tensor, Tensor]]:
    """`count` random images with targets, one image each."""
    return [(torch.randn(1, 3, image_size, image_size), torch.randint(1000, (1,))) for _ in range(count)]


Models = dict[str, tuple[Callable[[nn.Module, MicroBatches], Contestant], nn.Module]]


def gn_models(model: nn.Module) -> Models:
    """`gn` without WS, and with WS by each implementation, all from the parameters of `model`."""
    gn, _ = bl.convert(model, "gn")
    gn_ws, _ = bl.convert(model, "gn+ws")
    return {
        "gn, plain loop": (plain_step, copy.deepcopy(gn)),
        "gn, accumulate": (accumulated_step, gn),
        "gn+ws, accumulate": (accumulated_step, gn_ws),
        "gn + timm's StdConv2d, plain loop": (plain_step, with_layers(gn, {nn.Conv2d: timm_conv})),
        "gn + authors' ws, plain loop": (plain_step, with_layers(gn, {nn.Conv2d: authors_conv})),
    }


def bcn_models(model: nn.Module) -> Models:
    """`bn`, and micro-batch BCN with WS by batchless and by the authors' formula, all from the parameters of `model`."""
    bcn, _ = bl.convert(model, "bcn-micro+ws")
    authors = with_layers(
        model,
        {
            nn.Conv2d: authors_conv,
            nn.BatchNorm2d: lambda norm: AuthorsBatchChannelNorm(norm.num_features, rate=RATE),
        },
    )
    return {
        "bn, plain loop": (plain_step, copy.deepcopy(model)),
        "bcn-micro+ws, accumulate": (accumulated_step, bcn),
        "authors' bcn + ws, plain loop": (plain_step, authors),
    }


def plain_step(model: nn.Module, images: MicroBatches, forward: Forward | None = None) -> Contestant:
    """An optimizer step by the loop that everybody writes: accumulate the mean loss's gradients, step.

    `forward` takes the place of calling the model.
    """
    optimizer = _sgd(model)
    forward = model if forward is None else forward

    def run() -> None:
        for image, target in images:
            torch.autograd.backward(F.cross_entropy(forward(image), target) / len(images))
        optimizer.step()
        optimizer.zero_grad()

    return run


def accumulated_step(model: nn.Module, images: MicroBatches, forward: Forward | None = None) -> Contestant:
    """The same optimizer step through `batchless.accumulate`."""
    optimizer = _sgd(model)
    forward = model if forward is None else forward

    def run() -> None:
        with bl.accumulate(model, optimizer) as step:
            for image, target in images:
                step.backward(F.cross_entropy(forward(image), target), samples=1)

    return run


def _sgd(model: nn.Module) -> SGD:
    # The papers' optimizer with a rate so small that the weights stay what they are: all rounds do the same arithmetic.
    return SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)


def require_finite(models: Mapping[str, nn.Module]) -> None:
    """Refuse times of a network that diverged, whose arithmetic may be quicker or slower.

    Raises:
        RuntimeError: a parameter is infinite or NaN.
    """
    for name, model in models.items():
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise RuntimeError(f"{name} diverged while it was timed: its times mean nothing")
