"""What every layer with a reparameterized weight shares: where its weight comes from, and torch's forward around it.

A layer computes with `W_hat = reparameterization(W)` while the optimizer, weight decay and checkpoints see the raw `W`
under the plain layer's key `weight`. Subclassing torch's layer and calling its own convolution keeps these keys;
`torch.nn.utils.parametrize` would rename them, and its cache cannot span two backward passes.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.nn.standardized_rows import RowStandardization
from batchless.nn.weight_matrix import fan_in


class KeptWeight:
    """Memory of the size of a layer's `W_hat`, kept from one optimizer step to the next, until the next `W_hat` is made.

    Freed at each step's end it goes back to the system, which hands it out again page by page: 5 % of a step
    (`python -m bench step`). It is `W_hat` itself, or the gradient that took its place in memory. Kept only where a gradient
    is wanted, so evaluation leaves nothing behind.
    """

    def __init__(self) -> None:
        self._leaf: Tensor | None = None
        self._memory: Tensor | None = None

    def __reduce__(self) -> tuple[type["KeptWeight"], tuple[()]]:
        """Copies and pickles of a layer start without: it holds nothing that the weight does not."""
        return (KeptWeight, ())

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return self._leaf is None and self._memory is None

    def free(self) -> None:
        """Keep nothing: the next tensor of its size then gets the same memory, which is there already."""
        self._leaf = self._memory = None

    def keep(self, weight: Tensor) -> Tensor:
        """`weight`, which nobody else has, as a leaf that wants a gradient."""
        self._leaf = weight.requires_grad_()
        return self._leaf

    def keep_memory(self, tensor: Tensor) -> None:
        """Keep that of `tensor`, which others have too: nothing is written to it."""
        self._leaf, self._memory = None, tensor

    def hold(self, weight: Tensor) -> Tensor:
        """A leaf tensor with the values of `weight`; `weight` itself, and nothing is kept, where no gradient is wanted."""
        if not weight.requires_grad:
            self.free()
            return weight
        self._memory = None
        leaf = self._leaf
        if leaf is None or (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) != (
            weight.shape,
            weight.stride(),
            weight.dtype,
            weight.device,
        ):
            leaf = self.keep(torch.empty_like(weight, requires_grad=False))
        with torch.no_grad():
            return leaf.copy_(weight)


class Reparameterized(nn.Module):
    """Abstract: a torch layer whose forward uses `effective_weight()` in place of `weight`.

    A concrete layer is `class X(<reparameterization>, <forward below>, <torch's layer>)`; its arguments are torch's, then
    the reparameterization's by keyword.
    """

    weight: Tensor
    bias: Any
    groups: int
    transposed: bool
    stride: tuple[int, ...]
    shared_weight: Tensor | None
    """`W_hat`, while `batchless.standardized` holds it for several forwards; None otherwise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared_weight = None
        self.kept_weight = KeptWeight()

    @abstractmethod
    def reparameterized_weight(self) -> Tensor:
        """`W_hat`, computed from the parameters, in the shape and dtype of `weight`."""

    @abstractmethod
    def row_map(self) -> RowStandardization | None:
        """What `reparameterized_weight` does to each row of the weight, if that is one map with a constant factor."""

    def effective_weight(self) -> Tensor:
        """`W_hat`: the shared one inside `batchless.standardized`, else computed now."""
        return self.reparameterized_weight() if self.shared_weight is None else self.shared_weight

    def weight_fan_in(self) -> int:
        """Number of weights that feed one output channel."""
        return fan_in(self.weight, transposed=self.transposed, groups=self.groups)


class ConvForward(Reparameterized):
    """Abstract: the forward of `torch.nn.Conv1d`, `Conv2d`, `Conv3d` with the effective weight."""

    pad_input: nn.Module | None
    """Pads the input before the convolution (as timm's `Conv2dSame` does); None: torch's padding alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad_input = None

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` `[N, C, ..]` (or `[C, ..]`) with the effective weight."""
        if self.pad_input is not None:
            input = self.pad_input(input)
        convolve: Any = self._conv_forward
        output: Tensor = convolve(input, self.effective_weight(), self.bias)
        return output


class ConvTransposeForward(Reparameterized):
    """Abstract: the forward of `torch.nn.ConvTranspose1d`, `2d`, `3d` with the effective weight."""

    stride: tuple[int, ...]
    padding: Any
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transposed convolution of `input` `[N, C, ..]`; `output_size` as in torch."""
        dimensions = len(self.kernel_size)
        resolve_output_padding: Any = self._output_padding
        output_padding = resolve_output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        )
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        output: Tensor = convolve(
            input,
            self.effective_weight(),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return output


class LinearForward(Reparameterized):
    """Abstract: the forward of `torch.nn.Linear` with the effective weight."""

    groups = 1
    transposed = False
    stride = ()

    def forward(self, input: Tensor) -> Tensor:
        """Linear map of `input` `[.., inputs]` with the effective weight."""
        return F.linear(input, self.effective_weight(), self.bias)


def require_fan_in(layer: Reparameterized, *, reason: str) -> None:
    """Raise ValueError if one weight feeds each output channel, where `reason` says what centring would do to it."""
    if layer.weight_fan_in() < 2:
        raise ValueError(
            f"{type(layer).__name__} with weight {tuple(layer.weight.shape)} and groups={layer.groups} has a fan-in of 1: "
            f"{reason}. Use the plain layer here (a converter skips such layers)."
        )
