"""Standardizing all 53 convolution weights of ResNet-50, forward and backward."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torchvision
from torch import Tensor, nn

from batchless.nn import WSConv2d, standardize_weight, standardized
from bench.formulas import authors_standardized, timm_standardized
from bench.saved import peak_bytes
from bench.timing import Clock, Comparison, Contestant, Target, Times, interleave

REPEATS = 120

TARGETS = (
    Target(of="batchless, in a step", base="timm", at_most=0.5),
    Target(of="batchless, in a step", base="authors", at_most=0.12),
)

_FUSED = 5
"""Passes over the weights that a fused standardization makes at least: forward reads W and writes W_hat; backward reads
the gradient of W_hat and W, and writes the gradient of W."""


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """The one comparison; see the module."""
    weights = resnet50_weights(seed)
    gradients = [1e-3 * torch.randn_like(weight) for weight in weights]
    room = [torch.empty_like(weight) for weight in weights]
    contestants = {
        "batchless, in a step": in_a_step(weights, gradients),
        "batchless": forward_backward(standardize_weight, weights, gradients),
        "batchless, preset authors": forward_backward(
            lambda weight: standardize_weight(weight, "authors"), weights, gradients
        ),
        "timm": forward_backward(timm_standardized, weights, gradients),
        "authors": forward_backward(authors_standardized, weights, gradients),
        "w * 1.0": forward_backward(lambda weight: weight * 1.0, weights, gradients),
        "memory copy": lambda: _copy(weights, room),
    }
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    bytes_moved = {**dict.fromkeys(contestants, _FUSED * size), "w * 1.0": 4 * size, "memory copy": 2 * size}
    times = interleave(contestants, repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round)
    yield Comparison(
        title=f"standardize {len(weights)} convolution weights ({size / 1e6:.1f} MB), forward + backward",
        base="timm",
        times=times,
        targets=TARGETS,
        bytes_moved=bytes_moved,
        notes=(floor_note(times), peak_note(weights, gradients)),
    )


def floor_note(times: Times) -> str:
    """What the fewest passes would take at the speed of a copy, by minima."""
    floor = _FUSED / 2 * min(times["memory copy"])
    share = floor / min(times["timm"])
    return f"floor: {_FUSED} passes at the speed of the copy's 2 are {1e3 * floor:.1f} ms, {share:.3f} of timm"


def peak_note(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> str:
    """What a step has beside the weights at most; without standardization that is their gradients, once their size."""
    layers = _layers(weights)

    def step() -> None:
        with standardized(layers):
            for layer, gradient in zip(layers, gradients, strict=True):
                layer.shared_weight.grad = gradient.clone()

    most, size = peak_bytes(step), sum(weight.nbytes for weight in weights)
    return (
        f"beside the weights a step has at most {most / 1e6:.1f} MB, {most / size:.3f} of theirs: "
        f"{most / size - 1:.3f} more than their gradients alone"
    )


def resnet50_weights(seed: int) -> list[Tensor]:
    """The weights of torchvision's ResNet-50 with random values of deviation 1, as leaves that require a gradient.

    With that deviation the pullback is a projection: `in_a_step` may apply it to the same gradient again and again.
    """
    torch.manual_seed(seed)
    model = torchvision.models.resnet50()
    kernels = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return [standardize_weight(kernel).detach().requires_grad_() for kernel in kernels]


def forward_backward(
    standardize: Callable[[Tensor], Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Contestant:
    """All forwards, then one backward from the given gradients of all outputs into `.grad`, as in a training step."""

    def run() -> None:
        outputs = [standardize(weight) for weight in weights]
        torch.autograd.backward(outputs, gradients)
        for weight in weights:
            weight.grad = None

    return run


def in_a_step(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Contestant:
    """What `accumulate` adds to an optimizer step: all `W_hat` at its begin, the gradients of all W at its end."""
    layers = _layers(weights)
    gradients = [gradient.clone() for gradient in gradients]

    def run() -> None:
        with standardized(layers):
            for layer, gradient in zip(layers, gradients, strict=True):
                layer.shared_weight.grad = gradient
        for layer in layers:
            layer.weight.grad = None

    return run


def _layers(weights: Sequence[Tensor]) -> nn.ModuleList:
    layers = nn.ModuleList(WSConv2d(weight.shape[1], *weight.shape[:1], weight.shape[2:]) for weight in weights)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight.detach())
    return layers


@torch.no_grad()
def _copy(weights: Sequence[Tensor], room: Sequence[Tensor]) -> None:
    for weight, target in zip(weights, room, strict=True):
        target.copy_(weight)
