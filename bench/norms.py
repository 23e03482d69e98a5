"""All 53 normalizations of ResNet-50 on one 224 px image, forward and backward, without the convolutions between them."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torchvision
from torch import Tensor, nn

from batchless.nn import BatchChannelNorm
from bench.formulas import AuthorsBatchChannelNorm
from bench.timing import Clock, Comparison, Contestant, Target, interleave

REPEATS = 20
IMAGE_SIZE = 224
RATE = 0.01

TARGETS = (
    Target(of="bcn-micro, fused", base="bn", at_most=1.12),
    Target(of="bcn-micro, fused", base="authors' bcn", at_most=0.5),
)

_FUSED = 5
"""Passes over the signal that a fused normalization makes at least: forward reads x and writes y; backward reads the
gradient of y and x, and writes the gradient of x."""


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """The one comparison; see the module."""
    torch.manual_seed(seed)
    inputs = [torch.randn(shape, requires_grad=True) for shape in resnet50_shapes()]
    gradients = [torch.randn_like(x) for x in inputs]
    builders: dict[str, Callable[[int], nn.Module]] = {
        "bn": nn.BatchNorm2d,
        "gn": lambda channels: nn.GroupNorm(32, channels),
        "bcn-micro, fused": collecting,
        "bcn-micro, composed": lambda channels: composed(collecting(channels)),
        "authors' bcn": lambda channels: AuthorsBatchChannelNorm(channels, rate=RATE),
    }
    contestants = {
        name: forward_backward([build(x.shape[1]) for x in inputs], inputs, gradients)
        for name, build in builders.items()
    }
    contestants["memory copy"] = lambda: [x.detach().clone() for x in inputs]
    size = sum(x.numel() * x.element_size() for x in inputs)
    yield Comparison(
        title=f"{len(inputs)} normalizations ({size / 1e6:.1f} MB), forward + backward",
        base="bn",
        times=interleave(contestants, repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round),
        targets=TARGETS,
        bytes_moved={**dict.fromkeys(contestants, _FUSED * size), "memory copy": 2 * size},
    )


def resnet50_shapes() -> list[tuple[int, ...]]:
    """What the network's normalizations get, found without computing anything."""
    shapes: list[tuple[int, ...]] = []
    with torch.device("meta"):
        model = torchvision.models.resnet50().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return shapes


def collecting(channels: int) -> BatchChannelNorm:
    """Micro-batch BCN as it is inside `batchless.accumulate`."""
    layer = BatchChannelNorm(channels)
    layer.batch_norm.start_collecting()  # type: ignore[operator]
    return layer


def composed(layer: BatchChannelNorm) -> BatchChannelNorm:
    """`layer` by its readable form: a hook between its steps rules the fused one out."""
    layer.batch_norm.register_forward_hook(lambda *_: None)
    return layer


def forward_backward(layers: Sequence[nn.Module], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Contestant:
    """Each layer forward and backward, one after another."""

    def run() -> None:
        for layer, x, gradient in zip(layers, inputs, gradients, strict=True):
            layer(x).backward(gradient)
            x.grad = None

    return run
