"""Train with less activation memory: what is cheap to compute again is not kept for the backward pass."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchless.nn.batch_channel_norm import BatchChannelNorm
from batchless.nn.rebuilding import Recording, SavedTensor
from batchless.nn.skip_init import SkipInit
from batchless.nn.weight_matrix import fan_in
from batchless.surgery.recognize import is_activation, is_convolution, is_normalization
from batchless.surgery.replay import Used, estimates_of, forward_again, why_not
from batchless.surgery.report import aligned
from batchless.surgery.swap import copy_of

_DEPTH = {1: 0, 2: 2, 3: 8}
"""Convolutions in a row that a level computes again at most before it keeps one's output."""


@dataclass(frozen=True)
class LeanEntry:
    """One layer, and whether its output is computed `again` in the backward pass or `kept` where autograd wants it."""

    name: str
    kind: str
    output: Literal["again", "kept"]
    detail: str


@dataclass(frozen=True)
class LeanReport:
    """What `lean` arranged; prints as a table."""

    level: int
    entries: tuple[LeanEntry, ...]

    @property
    def again(self) -> tuple[LeanEntry, ...]:
        """Layers whose output is computed again."""
        return tuple(entry for entry in self.entries if entry.output == "again")

    @property
    def kept(self) -> tuple[LeanEntry, ...]:
        """Layers whose output is kept."""
        return tuple(entry for entry in self.entries if entry.output == "kept")

    def __str__(self) -> str:
        """Table of all layers below a summary line."""
        summary = f"lean level {self.level}: {len(self.again)} layers computed again, {len(self.kept)} kept"
        rows = [("layer", "kind", "output", "detail")]
        rows += [(entry.name or "(model)", entry.kind, entry.output, entry.detail) for entry in self.entries]
        return "\n".join([summary, "", *aligned(rows)])


def require_lean_level(level: int) -> None:
    """Raise ValueError unless `level` is one of `lean`'s."""
    if level not in (0, *_DEPTH):
        raise ValueError(f"lean level must be 0, 1, 2 or 3, got {level!r}: 0 keeps all, 3 keeps least")


def lean(model: nn.Module, level: int = 1) -> tuple[nn.Module, LeanReport]:
    """A copy of `model` whose training keeps fewer activations, with the same gradients.

    While the copy runs with gradients enabled, autograd's saved tensors go through hooks. A tensor that a layer made of one
    which is saved anyway is computed again in the backward pass, by the same kernels on the same values:

    - level 1: outputs of normalizations and activations, from the convolution's output;
    - level 2: also outputs of convolutions whose filters have no more weights than there are output channels (the 1x1 at
      the end of a bottleneck, widening shortcuts, depthwise ones), at most two in a row;
    - level 3: also those of every convolution inside a block, as block checkpointing does; a block is a smallest module
      with two normalizations or more.
    - level 0: a plain copy; also the way back.

    No statistic is moved or collected a second time, and shared standardized weights stay shared. Evaluation, passes without
    gradients, compiled, exported and functorch-transformed ones are untouched; so are state dict keys. Convert first: hooks
    are on the layers that are there. Layers that users have hooked are kept.

    Args:
        model: any module; it is not changed. Its own call, not that of a part, is what is made lean.
        level: 0 to 3.

    Returns:
        The copy, and a report that prints as a table.

    Raises:
        ValueError: an unknown level, or a model without a layer to compute again.

    In backward passes RuntimeError, as autograd's own, where what the pass needs was changed in place since the forward.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> small, report = lean(model, 1)
    >>> [(entry.name, entry.output) for entry in report.entries]
    [('0', 'kept'), ('1', 'again'), ('2', 'again'), ('3', 'kept')]
    """
    require_lean_level(level)
    model = copy_of(model)
    _forget(model)
    if level == 0:
        return model, LeanReport(0, ())
    entries = tuple(_entries(model, level))
    report = LeanReport(level, entries)
    if not report.again:
        raise ValueError(
            f"nothing to compute again in {type(model).__name__} at level {level}: it has no normalization or activation "
            "layer with a known forward; activations called as functions count only after one"
        )
    hooks = _Hooks(level)
    for entry in report.again:
        layer = model.get_submodule(entry.name)
        if type(layer) is not nn.ReLU:  # whose output a recording follows by itself: autograd saves it
            hooks.attach(layer)
    if level == 3:
        for block in _blocks(model):
            block.register_forward_hook(hooks.after_block)
    model.register_forward_pre_hook(hooks.begin, prepend=True)
    model.register_forward_hook(hooks.end, always_call=True)
    return model, report


def _entries(model: nn.Module, level: int) -> Iterator[LeanEntry]:
    inside = {id(module) for block in _blocks(model) for module in block.modules()} if level == 3 else set()
    # Hooked, the first step of micro-batch BCN would no longer be fused with the second.
    steps = {
        id(norm.batch_norm) for norm in model.modules() if isinstance(norm, BatchChannelNorm) and estimates_of(norm)
    }
    for name, module in model.named_modules():
        if id(module) in steps:
            continue
        if not (
            is_normalization(module) or is_activation(module) or is_convolution(module) or isinstance(module, SkipInit)
        ):
            continue
        reason = why_not(module)
        if reason is None and _has_hooks(module):
            reason = "hooks run before or after it"
        if reason is None and is_convolution(module) and id(module) not in inside:
            reason = _why_dear(module, level)
        yield LeanEntry(name, type(module).__name__, "again" if reason is None else "kept", reason or "")


def _why_dear(module: nn.Module, level: int) -> str | None:
    """Why a convolution outside of level 3's blocks is not computed again."""
    layer: Any = module
    if level == 1:
        return "level 1 keeps convolutions"
    weights = fan_in(layer.weight, transposed=layer.transposed, groups=layer.groups)
    return None if weights <= layer.out_channels else f"{weights} weights feed each of {layer.out_channels} channels"


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The smallest modules that hold two normalizations or more; without any normalization, two convolutions."""
    normalized = any(map(is_normalization, model.modules()))
    counts = is_normalization if normalized else is_convolution
    number: dict[int, int] = {}

    def count(module: nn.Module) -> int:
        # A normalization of two steps is one.
        if id(module) not in number:
            number[id(module)] = 1 if counts(module) else sum(map(count, module.children()))
        return number[id(module)]

    count(model)
    return [
        module
        for module in model.modules()
        if number.get(id(module), 0) > 1 and all(number[id(child)] < 2 for child in module.children())
    ]


class _Hooks:
    """What runs before and after the model and its layers; it knows no module, so that copies of a model have their own."""

    def __init__(self, level: int) -> None:
        self.level = level
        self._recordings: dict[int, list[Recording | None]] = {}
        self._calls: dict[int, list[_Call]] = {}

    def __reduce__(self) -> tuple[type["_Hooks"], tuple[int]]:
        """Copies and pickles start outside of any forward."""
        return (_Hooks, (self.level,))

    def attach(self, module: nn.Module) -> None:
        """Watch the calls of a layer whose output can be computed again."""
        module.register_forward_pre_hook(self.before_layer, with_kwargs=True)
        module.register_forward_hook(self.after_layer)

    def begin(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        recording = None
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            recording = Recording()
            recording.__enter__()
        self._recordings.setdefault(threading.get_ident(), []).append(recording)

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        active = self._recordings.get(thread)
        if not active:  # a hook before ours has failed
            return
        recording = active.pop()
        if not active:
            del self._recordings[thread]
            self._calls.pop(thread, None)
        if recording is not None:
            recording.__exit__(None, None, None)

    def before_layer(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        recording = self._recording()
        if recording is None:
            return
        input = next(iter((*inputs, *keywords.values())), None)
        if not isinstance(input, Tensor):
            return
        estimates = estimates_of(module)
        if estimates is not None:
            estimates.used = []
        call = _Call(module, input, input._version, recording.find(input))
        self._calls.setdefault(threading.get_ident(), []).append(call)

    def after_layer(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        recording = self._recording()
        if recording is None:
            return
        estimates = estimates_of(module)
        used: list[Used] = []
        if estimates is not None:
            used, estimates.used = estimates.used or [], None
        call = self._finished(module)
        if call is None or not isinstance(output, Tensor) or output.grad_fn is None or output.numel() == 0:
            return
        if (output is call.input and output._version == call.version) or _has_hooks(module):
            return
        source = call.source(recording)
        if source is None or (estimates is not None and not used):
            return
        depth = source.depth + is_convolution(module)
        if depth <= _DEPTH[self.level] and recording.keeps(output):
            recording.replayable(output, forward_again(module, output, used), source, depth=depth)

    def after_block(self, module: nn.Module, inputs: Any, output: Any) -> None:
        recording = self._recording()
        if recording is not None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    recording.keep(leaf)

    def _recording(self) -> Recording | None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        active = self._recordings.get(threading.get_ident())
        return active[-1] if active else None

    def _finished(self, module: nn.Module) -> "_Call | None":
        calls = self._calls.get(threading.get_ident(), [])
        while calls:  # above it may be calls that ended in an exception
            if (call := calls.pop()).module is module:
                return call
        return None


class _Call(NamedTuple):  # a frozen dataclass takes three times as long to make
    """A layer about to run: on what, and what was known of it then."""

    module: nn.Module
    input: Tensor
    version: int
    known: SavedTensor | None

    def source(self, recording: Recording) -> SavedTensor | None:
        """What the layer's output can be computed from: its input, if that is saved or can itself be computed."""
        if self.input._version == self.version:
            return recording.find(self.input)
        # It ran in place: its input is there no more, unless it can be computed.
        return self.known if self.known is not None and not self.known.kept else None


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's hooks run before or after the forward."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not _ours(hook) for hook in hooks)


def _ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Hooks)


def _forget(model: nn.Module) -> None:
    """Remove the hooks of an earlier call."""
    for module in model.modules():
        for kept in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in kept.items() if _ours(hook)]:
                del kept[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)
