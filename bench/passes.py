"""Single passes over ResNet-50's normalizations on one 224 px image: what each kernel takes, in bytes per second of a copy.

A pass reads or writes the whole signal once. Bytes moved are those of the operations as they are written, one after another
over each map; a map that stays in the cache between them moves fewer.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.ops import aten

from batchless.nn.fused_batch_channel_norm import _gradient_sums
from batchless.nn.normalized_samples import normalize_samples
from bench.norms import resnet50_shapes
from bench.timing import Clock, Comparison, Contestant, interleave

REPEATS = 20

Pass = Callable[["Signal"], object]


class Signal:
    """One normalization's input x `[1, C, H, W]`, the gradient g of its output, and vectors for each channel.

    `rows` and `gradient_rows` are x and g as `[C, positions]`, `room` has their shape, `scale` and `shift` are `[C, 1]`.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.x, self.gradient = torch.randn(*shape), torch.randn(*shape)
        self.channels, self.positions = shape[1], self.x[0, 0].numel()
        self.rows = self.x.view(self.channels, -1)
        self.gradient_rows = self.gradient.view(self.channels, -1)
        self.room = torch.empty_like(self.rows)
        self.scale, self.shift = torch.rand(2, self.channels, 1)
        samples = normalize_samples(self.x)
        self.mean, self.rstd = samples.mean, samples.rstd
        self.ones = torch.ones(self.channels)
        self.batch = (self.mean.view(-1), self.rstd.view(-1))
        self.group_mean, self.group_rstd = _group_norm(self)[1:]


class _Nothing(torch.autograd.Function):
    """The same storage out as in: what a Python function costs autograd by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """The one comparison; see the module."""
    torch.manual_seed(seed)
    signals = [Signal(shape) for shape in resnet50_shapes()]
    size = sum(signal.x.nbytes for signal in signals)
    yield Comparison(
        title=f"single passes over {len(signals)} normalizations' inputs ({size / 1e6:.1f} MB)",
        base="memory copy",
        times=interleave(
            {name: over_all(run, signals) for name, (_, run) in PASSES.items()},
            repeats=repeats or REPEATS,
            seed=seed,
            clock=clock,
            on_round=on_round,
        ),
        bytes_moved={name: passes * size for name, (passes, _) in PASSES.items()},
    )


def over_all(run: Pass, signals: Sequence[Signal]) -> Contestant:
    """The pass on one signal after another, without autograd's graph where it makes none itself."""

    def all_of_them() -> None:
        with torch.no_grad():
            for signal in signals:
                run(signal)

    return all_of_them


def _scale_and_shift(signal: Signal) -> Tensor:
    return signal.room.mul_(signal.scale).add_(signal.shift)


def _affine(signal: Signal) -> Tensor:
    return torch.addcmul(signal.shift, signal.rows, signal.scale)


def _input_gradient(signal: Signal) -> Tensor:
    """As fused BCN makes it: `scale g + scale x + shift`, with vectors of its own for each."""
    result = signal.gradient_rows * signal.scale
    return result.addcmul_(signal.rows, signal.scale).add_(signal.shift)


def _group_norm(signal: Signal) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = aten.native_group_norm(
        signal.x, signal.ones, signal.ones, 1, signal.channels, signal.positions, 32, 1e-5
    )
    return found


def _group_norm_backward(signal: Signal) -> Any:
    return aten.native_group_norm_backward(
        signal.gradient,
        signal.x,
        signal.group_mean,
        signal.group_rstd,
        signal.ones,
        1,
        signal.channels,
        signal.positions,
        32,
        [True, True, True],
    )


def _batch_norm_backward(signal: Signal) -> Any:
    return aten.native_batch_norm_backward(
        signal.gradient, signal.x, signal.ones, None, None, *signal.batch, True, 1e-5, [True, True, True]
    )


@torch.enable_grad()
def _nothing(signal: Signal) -> None:
    leaf = signal.x.detach().requires_grad_()
    _Nothing.apply(leaf).backward(signal.gradient)


PASSES: dict[str, tuple[int, Pass]] = {
    "memory copy": (2, lambda signal: signal.room.copy_(signal.rows)),
    "var_mean per channel": (1, lambda signal: torch.var_mean(signal.rows, 1, correction=0)),
    "batch_norm_update_stats": (1, lambda signal: aten.batch_norm_update_stats(signal.x, None, None, 0.0)),
    "z and moments: native_group_norm, C groups": (2, lambda signal: normalize_samples(signal.x)),
    "output over z: mul_, add_": (4, _scale_and_shift),
    "output anew: addcmul": (2, _affine),
    "sums of g and g z: native_group_norm_backward": (
        2,
        lambda signal: _gradient_sums(signal.gradient_rows, signal.rows, signal.mean, signal.rstd),
    ),
    "dx: mul, addcmul_, add_": (7, _input_gradient),
    "bn forward": (
        2,
        lambda signal: aten.native_batch_norm(signal.x, signal.ones, signal.ones, None, None, True, 0.1, 1e-5),
    ),
    "bn backward": (3, _batch_norm_backward),
    "gn forward": (2, _group_norm),
    "gn backward": (3, _group_norm_backward),
    "autograd.Function that does nothing": (0, _nothing),
}
"""By name: how many passes it makes, and the operations."""
