"""Pairs of layers found by one forward on an example: what each tensor came from and where it went."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchless.nn.activation_gain import activation_gain
from batchless.surgery.pairs import Activation, Pairs, feeds_norm
from batchless.surgery.recognize import is_convolution, is_normalization

_ACTIVATIONS = frozenset(
    [
        "relu",
        "hardtanh",
        "silu",
        "gelu",
        "hardswish",
        "mish",
        "leaky_relu",
        "elu",
        "celu",
        "selu",
        "softplus",
        "sigmoid",
        "tanh",
        "hardsigmoid",
        "relu6",
    ]
)
"""Elementwise activations as torch's operators name them, whether a module or a function called them."""

_PASS_THROUGH = frozenset(
    [
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "max_pool2d",
        "max_pool1d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_max_pool2d",
        "mean",
        "view",
        "_unsafe_view",
        "reshape",
        "clone",
        "constant_pad_nd",
        "reflection_pad2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "cat",
        "permute",
        "transpose",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
        "expand",
        "squeeze",
        "unsqueeze",
        "roll",
        "_to_copy",
        "detach",
        "alias",
        "native_dropout",
        "contiguous",
        "select",
    ]
)
"""Operators after which the signal is still that of the activation before them."""


@dataclass(eq=False)
class _Output:
    """The output of one call of a layer: which layer's, what consumed it."""

    layer: str
    is_linear: bool
    norm: str | None = None
    other_uses: int = 0


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows outputs of layers and of activations from operator to operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: list[_Output] = []
        self.inside_norm = 0
        self.gains: dict[str, Activation | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            output = getattr(tensor, "_batchless_output", None)
            if output is not None and not self.inside_norm:
                output.other_uses += 1
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        base = name[:-1] if name.endswith("_") else name
        activation = self._activation(func, base, inputs, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor._batchless_activation = activation  # type: ignore[attr-defined]
        return result

    def _activation(
        self, func: Any, base: str, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Activation | None:
        if base in _ACTIVATIONS:
            settings = [value for value in args[1:] if not isinstance(value, Tensor)]
            key = f"{base}{tuple(settings) or ''}{kwargs or ''}"
            if key not in self.gains:
                plain = getattr(torch.ops.aten, base)
                self.gains[key] = _gain(key, lambda z: plain(z, *settings, **kwargs))
            return self.gains[key]
        if base in ("_prelu_kernel", "prelu"):
            slope = float(inputs[1].mean())
            return _gain(f"prelu({slope:g})", lambda z: torch.where(z >= 0, z, slope * z))
        carried = [getattr(tensor, "_batchless_activation", None) for tensor in inputs if tensor.is_floating_point()]
        if base in _PASS_THROUGH and carried and all(item == carried[0] for item in carried):
            return carried[0]
        if base == "mul" and len(inputs) == 2 and inputs[0].numel() != inputs[1].numel():
            # A gate (squeeze-excite) scales whole channels: the signal is still its activation's.
            larger = 0 if inputs[0].numel() > inputs[1].numel() else 1
            return carried[larger] if len(carried) == 2 else None
        return None


def _gain(name: str, function: Callable[[Tensor], Tensor]) -> Activation | None:
    try:
        return Activation(name, activation_gain(function))
    except (ValueError, RuntimeError):
        return None


def as_arguments(example: object) -> tuple[object, ...]:
    """`example` as positional arguments: a tuple is them, anything else is the only one."""
    return example if isinstance(example, tuple) else (example,)


def pairs_by_example(model: nn.Module, example: object) -> Pairs:
    """Pairs as the data flows when `model` runs on `example`, in evaluation mode without gradients.

    The model itself is not touched: a copy runs.

    Raises:
        ValueError: the model does not run on the example.
    """
    probe = copy.deepcopy(model).eval()
    watch, pairs = _Watch(), Pairs()
    calls: Counter[str] = Counter()
    norm_calls: Counter[str] = Counter()
    for name, module in probe.named_modules():
        if is_normalization(module):
            _hook_norm(module, name, watch, pairs, norm_calls)
        elif feeds_norm(module):
            _hook_layer(module, name, watch, pairs, calls)
    arguments = copy.deepcopy(as_arguments(example))
    try:
        with torch.no_grad(), watch:
            probe(*arguments)
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example ({type(error).__name__}: {error}): pass what its forward takes, a tensor "
            "or a tuple of positional arguments"
        ) from error
    _conclude(pairs, watch.outputs, calls, norm_calls)
    return pairs


def _hook_layer(module: nn.Module, name: str, watch: _Watch, pairs: Pairs, calls: Counter[str]) -> None:
    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[name] += 1
        pairs.seen.add(name)
        activation = getattr(inputs[0], "_batchless_activation", None)
        if is_convolution(module) and activation is not None:
            pairs.activation_before[name] = activation

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        output._batchless_output = _Output(name, is_linear=not is_convolution(module))  # type: ignore[attr-defined]
        watch.outputs.append(output._batchless_output)  # type: ignore[attr-defined]

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _hook_norm(module: nn.Module, name: str, watch: _Watch, pairs: Pairs, norm_calls: Counter[str]) -> None:
    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        watch.inside_norm += 1
        norm_calls[name] += 1
        pairs.seen.add(name)
        pairs.rank[name] = x.dim()
        pairs.spatial[name] = min(math.prod(x.shape[2:]), pairs.spatial.get(name, math.prod(x.shape[2:])))
        output = getattr(x, "_batchless_output", None)
        if output is not None:
            output.other_uses += output.norm is not None
            output.norm = name

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        watch.inside_norm -= 1

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _conclude(pairs: Pairs, outputs: list[_Output], calls: Counter[str], norm_calls: Counter[str]) -> None:
    """Keep the pairs that hold in every call: the layer's output goes to one normalization and nowhere else."""
    together = Counter((output.layer, output.norm) for output in outputs if output.norm and not output.other_uses)
    # Behind a linear layer the channel of `[N, L, C]` is not the normalization's: only `[N, C]` can be merged.
    mergeable = {output.layer for output in outputs if not output.is_linear or pairs.rank.get(output.norm or "") == 2}
    for (layer, norm), count in together.items():
        if norm is not None and count == calls[layer]:
            pairs.norm_after[layer] = norm
            if count == norm_calls[norm] and layer in mergeable:
                pairs.exclusive.add(layer)
