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
from torch.utils._pytree import tree_leaves, tree_map

from batchless.nn.activation_gain import activation_gain
from batchless.surgery.pairs import UNKNOWN, Activation, Pairs, feeds_norm, pairs_by_structure
from batchless.surgery.recognize import is_convolution, is_normalization
from batchless.surgery.swap import copy_of

_ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "silu", "gelu", "mish", "hardswish"),
        *("softplus", "sigmoid", "hardsigmoid", "tanh", "softshrink", "hardshrink"),
    )
)
"""Elementwise activations as torch's operators name them, whether a module or a function called them."""

_SUMS = frozenset(
    (
        *("convolution", "_convolution", "linear", "addmm", "mm", "bmm", "baddbmm", "sum"),
        *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        *("cudnn_batch_norm", "miopen_batch_norm", "native_layer_norm", "native_group_norm", "_fused_rms_norm"),
    )
)
"""Operators that add many values or normalize: the activation before them says nothing about what comes out."""

_AFFINE = frozenset(["add", "sub", "rsub", "mul", "div"])
"""Pointwise operators that scale or shift a signal, if all they take beside it is constant over whole channels."""

_COPIES = frozenset(["clone", "copy", "_to_copy", "detach", "alias", "native_dropout"])
"""Operators after which the signal is what it was before, though torch counts some of them as pointwise."""


@dataclass(eq=False)
class _Output:
    """The output of one call of a layer: which layer's, what consumed it."""

    layer: str
    is_linear: bool
    norm: str | None = None
    other_uses: int = 0


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows outputs of layers, of normalizations and of activations from operator to operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: list[_Output] = []
        self.inside_norm = 0
        self.inside_inplace = 0
        self.overwritten: set[str] = set()
        self.gains: dict[str, Activation] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            output = getattr(tensor, "_batchless_output", None)
            if output is not None and not self.inside_norm:
                output.other_uses += 1
        norm = getattr(inputs[0], "_batchless_norm", None) if inputs else None
        if norm is not None and _writes_to_first(func) and not self.inside_inplace:
            self.overwritten.add(norm)
        result = func(*args, **kwargs)
        activation = self._activation(func, inputs, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor._batchless_activation = activation  # type: ignore[attr-defined]
                if norm is not None and _is_view(func):
                    tensor._batchless_norm = norm  # type: ignore[attr-defined]
        return result

    def _activation(
        self, func: Any, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Activation | None:
        """What the result of an operator is the output of: an activation, None for none, or `UNKNOWN`."""
        base = func.overloadpacket.__name__.removesuffix("_")
        if base in _ACTIVATIONS:
            settings = [value for value in args[1:] if not isinstance(value, Tensor)]
            key = f"{base}{tuple(settings) or ''}{kwargs or ''}"
            if key not in self.gains:
                plain = getattr(torch.ops.aten, base)
                self.gains[key] = _gain(key, lambda z: plain(z, *settings, **kwargs))
            return self.gains[key]
        if base in ("_prelu_kernel", "prelu"):
            return _prelu(inputs[1])
        if base in _SUMS:
            return None
        signals = [tensor for tensor in inputs if tensor.is_floating_point()]
        if base in _AFFINE and len(signals) == 2 and _values(signals[0]) != _values(signals[1]):
            # A gate (squeeze-excite) or a bias: the signal is still its activation's.
            signals = [max(signals, key=_values)]
        carried = [getattr(tensor, "_batchless_activation", None) for tensor in signals]
        if not carried or (base in ("add", "sub") and len(carried) > 1):
            return None
        scaled = base in _AFFINE and len(carried) == 1
        if torch.Tag.pointwise in func.tags and not scaled and base not in _COPIES:
            return UNKNOWN
        return carried[0] if all(item == carried[0] for item in carried) else UNKNOWN


def _values(tensor: Tensor) -> int:
    """How many values a tensor holds, those that `expand` repeats counted once."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _writes_to_first(func: Any) -> bool:
    """Whether an operator changes its first argument in place."""
    arguments = func._schema.arguments
    return bool(arguments and arguments[0].alias_info and arguments[0].alias_info.is_write)


def _is_view(func: Any) -> bool:
    """Whether an operator's result shares memory with its first argument."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _gain(name: str, function: Callable[[Tensor], Tensor]) -> Activation:
    try:
        return Activation(name, activation_gain(function))
    except (ValueError, RuntimeError):
        return UNKNOWN


def _prelu(slopes: Tensor) -> Activation:
    if slopes.is_meta:
        return UNKNOWN
    slope = float(slopes.mean())
    return _gain(f"prelu({slope:g})", lambda z: torch.where(z >= 0, z, slope * z))


def as_arguments(example: object) -> tuple[object, ...]:
    """`example` as positional arguments: a tuple is them, anything else is the only one."""
    return example if isinstance(example, tuple) else (example,)


def find_pairs(model: nn.Module, example: object) -> Pairs:
    """Those that an example shows, and by structure those that it did not reach; all by structure without one (None)."""
    by_structure = pairs_by_structure(model)
    if example is None:
        return by_structure
    pairs = pairs_by_example(model, example)
    # What the example did not reach (a branch for training only) is guessed from the structure.
    for layer, norms in by_structure.norms_after.items():
        if pairs.seen.isdisjoint((layer, *norms)):
            pairs.norms_after[layer] = norms
            if layer in by_structure.exclusive:
                pairs.exclusive.add(layer)
    for layer, activation in by_structure.activation_before.items():
        if layer not in pairs.seen:
            pairs.activation_before[layer] = activation
    pairs.unknown_activation |= by_structure.unknown_activation - pairs.seen
    return pairs


def pairs_by_example(model: nn.Module, example: object) -> Pairs:
    """Pairs as the data flows when `model` runs on `example`, in evaluation mode without gradients.

    The model itself is not touched: a copy runs.

    Raises:
        ValueError: the model does not run on the example.
    """
    probe = copy_of(model).eval()
    watch, pairs = _Watch(), Pairs()
    calls: Counter[str] = Counter()
    norm_calls: Counter[str] = Counter()
    for name, module in probe.named_modules():
        if is_normalization(module):
            _hook_norm(module, name, watch, pairs, norm_calls)
        elif feeds_norm(module):
            _hook_layer(module, name, watch, pairs, calls)
        if getattr(module, "inplace", False) is True:
            _hook_inplace(module, watch)
    devices = {tensor.device for tensor in (*probe.parameters(), *probe.buffers()) if tensor.is_cuda}
    try:
        arguments = copy.deepcopy(tree_map(_detached, as_arguments(example)))
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), watch:
            result = probe(*arguments)
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example ({type(error).__name__}: {' '.join(str(error).split())}): pass what its "
            "forward takes, a tensor or a tuple of positional arguments"
        ) from error
    for leaf in tree_leaves(result):
        if (output := getattr(leaf, "_batchless_output", None)) is not None:
            output.other_uses += 1
    _conclude(pairs, watch, calls, norm_calls)
    return pairs


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _input(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """What a layer of one input was called with, by position or by name."""
    tensor: Tensor = inputs[0] if inputs else next(iter(keywords.values()))
    return tensor


def _hook_layer(module: nn.Module, name: str, watch: _Watch, pairs: Pairs, calls: Counter[str]) -> None:
    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls[name] += 1
        pairs.seen.add(name)
        activation = getattr(_input(inputs, keywords), "_batchless_activation", None)
        if not is_convolution(module):
            return
        if activation is UNKNOWN or (calls[name] > 1 and activation != pairs.activation_before.get(name)):
            pairs.unknown_activation.add(name)
        elif activation is not None:
            pairs.activation_before[name] = activation

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        output._batchless_output = _Output(name, is_linear=not is_convolution(module))  # type: ignore[attr-defined]
        watch.outputs.append(output._batchless_output)  # type: ignore[attr-defined]

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _hook_norm(module: nn.Module, name: str, watch: _Watch, pairs: Pairs, norm_calls: Counter[str]) -> None:
    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        watch.inside_norm += 1
        if watch.inside_norm > 1:  # the first step of a normalization of two
            return
        x = _input(inputs, keywords)
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
        if isinstance(output, Tensor):
            output._batchless_norm = name  # type: ignore[attr-defined]

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _hook_inplace(module: nn.Module, watch: _Watch) -> None:
    """Disregard what a module writes in place because it was told to: it can be told otherwise."""

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        watch.inside_inplace += 1

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        watch.inside_inplace -= 1

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _conclude(pairs: Pairs, watch: _Watch, calls: Counter[str], norm_calls: Counter[str]) -> None:
    """Keep the pairs that hold in every call: the layer's output goes to one normalization and nowhere else."""
    together = Counter((output.layer, output.norm) for output in watch.outputs if output.norm and not output.other_uses)
    of_layer: Counter[str] = Counter()
    of_norm: Counter[str] = Counter()
    for (layer, norm), count in together.items():
        assert norm is not None
        of_layer[layer] += count
        of_norm[norm] += count
    # Behind a linear layer the channel of `[N, L, C]` is not the normalization's: only `[N, C]` can be merged.
    mergeable = {
        output.layer for output in watch.outputs if not output.is_linear or pairs.rank.get(output.norm or "") == 2
    }
    for layer, norm in together:
        if norm is not None and of_layer[layer] == calls[layer]:
            pairs.norms_after[layer] = (*pairs.norms_after.get(layer, ()), norm)
            if together[layer, norm] == calls[layer] == norm_calls[norm] and layer in mergeable:
                pairs.exclusive.add(layer)
    pairs.used_elsewhere = {output.layer for output in watch.outputs if output.norm} - pairs.norms_after.keys()
    pairs.overwritten = {norm for norm in watch.overwritten if of_norm[norm] < norm_calls[norm]}
