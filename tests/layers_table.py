"""Every public layer of `batchless.nn`, once; the generic suites (tests/nn/test_every_layer*.py) run over this table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import batchless.nn as bnn

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: how to build it, what to feed it, and torch's own layer to compare with.

    `kind`: `weight` reparameterizes a weight, `norm` normalizes activations, `other` does neither.
    `constructor(*arguments, **torch_options, **options)`; torch's own layer is `plain(*arguments, **torch_options)`, None
    where torch has no counterpart. `moves_estimates`: a training forward outside `accumulate` moves running estimates.
    `stateless`: no parameters, hence no device and dtype.
    """

    name: str
    kind: Literal["weight", "norm", "other"]
    constructor: type[nn.Module]
    arguments: tuple[Any, ...] = ()
    torch_options: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    input_shape: tuple[int, ...]
    plain: Callable[..., nn.Module] | None = None
    moves_estimates: bool = False
    stateless: bool = False

    def build(self, **factory: Any) -> nn.Module:
        """The layer with parameters and buffers that are neither 0 nor 1 and equal from call to call."""
        factory = {} if self.stateless else factory
        return scrambled(self.constructor(*self.arguments, **self.torch_options, **self.options, **factory))

    def build_plain(self, **factory: Any) -> nn.Module:
        """torch's own layer, scrambled alike."""
        assert self.plain is not None
        return scrambled(self.plain(*self.arguments, **self.torch_options, **factory))

    def input(self, *, samples: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same numbers at every call, of mean 0.3 and deviation 2 (`samples` replaces the batch size)."""
        shape = self.input_shape if samples is None else (samples, *self.input_shape[1:])
        generator = torch.Generator().manual_seed(1)
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype)


def scrambled(layer: nn.Module) -> nn.Module:
    """`layer` after replacing every float parameter, running statistic and estimate by other numbers of its kind."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            if value.is_meta or not value.is_floating_point() or name.endswith("memory"):
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            positive = name.endswith(("running_var", "gain")) or (name.endswith("weight") and value.dim() == 1)
            value.copy_(0.5 + noise.abs() if positive else noise)
    return layer


_CONVOLUTION = {"stride": 2, "padding": 1, "groups": 2}
_TRANSPOSED = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
_SPACES = {1: (5,), 2: (5, 4), 3: (3, 4, 3)}


def _weight_layers(prefix: str, *, suffix: str = "", **options: Any) -> tuple[Layer, ...]:
    layers = []
    for dimensions, space in _SPACES.items():
        for transposed in ("", "Transpose"):
            name = f"Conv{transposed}{dimensions}d"
            layer = Layer(
                name=f"{prefix}{name}{suffix}",
                kind="weight",
                constructor=getattr(bnn, prefix + name),
                arguments=(4, 6, 3),
                torch_options=_TRANSPOSED if transposed else _CONVOLUTION,
                options=options,
                input_shape=(2, 4, *space),
                plain=getattr(nn, name),
            )
            layers.append(layer)
    linear = Layer(
        name=f"{prefix}Linear{suffix}",
        kind="weight",
        constructor=getattr(bnn, f"{prefix}Linear"),
        arguments=(5, 4),
        options=options,
        input_shape=(3, 5),
        plain=nn.Linear,
    )
    return (*layers, linear)


LAYERS: tuple[Layer, ...] = (
    *_weight_layers("WS"),
    *_weight_layers("ScaledWS", gamma=1.7),
    *_weight_layers("ScaledWS", suffix="-gain", gamma=1.7, gain=True),
    *_weight_layers("WN"),
    *_weight_layers("CWN"),
    Layer(
        name="BatchChannelNorm-estimate",
        kind="norm",
        constructor=bnn.BatchChannelNorm,
        arguments=(8,),
        options={"memory": 20.0},
        input_shape=(3, 8, 4, 3),
        plain=nn.BatchNorm2d,
        moves_estimates=True,
    ),
    Layer(
        name="BatchChannelNorm-batch",
        kind="norm",
        constructor=bnn.BatchChannelNorm,
        arguments=(8,),
        options={"statistics": "batch"},
        input_shape=(3, 8, 4, 3),
        plain=nn.BatchNorm2d,
    ),
    Layer(
        name="EstimatedBatchNorm",
        kind="norm",
        constructor=bnn.EstimatedBatchNorm,
        arguments=(6,),
        options={"memory": 20.0},
        input_shape=(3, 6, 4, 3),
        plain=nn.BatchNorm2d,
        moves_estimates=True,
    ),
    Layer(
        name="BatchNorm",
        kind="norm",
        constructor=bnn.BatchNorm,
        arguments=(6,),
        input_shape=(3, 6, 4, 3),
        plain=nn.BatchNorm2d,
    ),
    Layer(
        name="FrozenBatchNorm",
        kind="norm",
        constructor=bnn.FrozenBatchNorm,
        arguments=(6,),
        input_shape=(3, 6, 4, 3),
        plain=nn.BatchNorm2d,
    ),
    Layer(name="SkipInit", kind="other", constructor=bnn.SkipInit, input_shape=(2, 3, 4, 3)),
    Layer(
        name="SamePad",
        kind="other",
        constructor=bnn.SamePad,
        arguments=((3, 4), (2, 1), (1, 2)),
        input_shape=(2, 3, 4, 3),
        stateless=True,
    ),
)
