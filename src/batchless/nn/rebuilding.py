"""Tensors that a backward pass asks for, computed again instead of kept.

While a `Recording` is active, autograd hands it every tensor that it would save. What a layer made of a tensor that is saved
anyway, or that can itself be computed again, need not be kept: `SavedTensor` then holds the computation in its place.
"""

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Replay = Callable[[Tensor, bool], Tensor]
"""Computes a layer's output from its input as the forward did, without changing any state.

Where it is told True nobody else wants the input, and it may write over it.
"""

_KEY = "batchless_saved"


class SavedTensor:
    """A tensor that backward passes may ask for: kept, or computed again from another one.

    A value that was computed again stays until all who wait for it have had it, so that nothing is computed twice in a
    backward pass. `depth` is the number of convolutions between it and the kept tensor that it starts from.
    """

    # On the class: there are hundreds in a forward, and most never get another value.
    depth = 0
    _source: "SavedTensor | None" = None
    _replay: Replay | None = None
    _uses = _waiting = 0
    _computed: Tensor | None = None
    _outer: tuple[Any, Callable[[Any], Tensor]] | None = None

    def __init__(self, tensor: Tensor) -> None:
        # Detached: its history would tie the graph that holds it into a cycle. The version counter is shared.
        self._kept: Tensor | None = tensor if tensor.grad_fn is None else tensor.detach()
        self._version = tensor._version

    @property
    def kept(self) -> bool:
        """Whether the tensor itself is held."""
        return self._replay is None

    def same_version(self, tensor: Tensor) -> bool:
        """Whether `tensor`, which this was made of, has not been changed in place since."""
        return self._version == tensor._version

    def keep(self, tensor: Tensor) -> None:
        """Hold `tensor`, which has this value, and compute no more."""
        if self._uses and self._source is not None:
            self._source.expect(-1)
        self.depth, self._kept, self._version = 0, tensor.detach(), tensor._version
        self._source = self._replay = None

    def compute(self, replay: Replay, source: "SavedTensor", *, depth: int) -> None:
        """Let go of the tensor; it is `replay` of the tensor `source`."""
        self.depth, self._kept, self._replay, self._source = depth, None, replay, source
        if self._uses:
            source.expect()

    def expect(self, more: int = 1) -> None:
        """So many more will ask for it in a backward pass; whoever computes it asks its source once."""
        before = self._uses
        self._uses += more
        self._waiting += more
        if self._source is not None and (before == 0) != (self._uses == 0):
            self._source.expect(more)

    def settle(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """Hand the tensor, if it is held and somebody will ask for it, to hooks that were there before ours."""
        if self._kept is not None and self._uses:
            self._outer = (pack(self._kept.detach()), unpack)
            self._kept = None

    def take(self) -> Tensor:
        """The tensor, for one who asks.

        Raises:
            RuntimeError: it has been changed in place since the forward pass.
        """
        if self._kept is not None:
            require_version(self._kept, self._version)
            return self._kept
        value = self._compute() if self._computed is None else self._computed
        self._waiting -= 1
        self._computed = value if self._waiting > 0 else None
        if self._waiting <= 0:  # another backward pass, through a graph that was retained
            self._waiting = self._uses
        return value

    def _compute(self) -> Tensor:
        if self._outer is not None:
            packed, unpack = self._outer
            return unpack(packed)
        assert self._replay is not None
        assert self._source is not None
        source = self._source
        alone = source._replay is not None and source._uses == 1
        with torch.no_grad():
            return self._replay(source.take(), alone)


def require_version(tensor: Tensor, version: int) -> None:
    """Raise RuntimeError if a tensor was changed in place, as autograd does for what it saves itself."""
    if tensor._version != version:
        raise RuntimeError(
            f"one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tensor.dtype} {tuple(tensor.shape)} is at version {tensor._version}, expected version {version}. "
            "Run the backward pass before parameters, buffers or activations are changed"
        )


class _Mark:
    """Left at the autograd node that made a tensor: which `SavedTensor` has its value, as long as nobody changed it."""

    def __init__(self, saved: SavedTensor, tensor: Tensor) -> None:
        # Weak: a node must not keep alive what autograd or the recording does not.
        self.saved = weakref.ref(saved)
        self.tensor = weakref.ref(tensor)
        self.output, self.version = tensor.output_nr, tensor._version


class Recording:
    """Saved-tensor hooks over one forward pass; hooks that were there before still get what is kept."""

    def __init__(self) -> None:
        self._saved: list[SavedTensor] = []
        self._leaves: dict[int, tuple[weakref.ref[Tensor], SavedTensor]] = {}
        self._outer: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "Recording":
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__()
        saved, self._saved = self._saved, []
        self._leaves.clear()
        if self._outer is not None and error is None:
            pack, unpack = self._outer
            for item in saved:
                item.settle(pack, unpack)

    def find(self, tensor: Tensor) -> SavedTensor | None:
        """What is known of the value of `tensor`; None if nothing, or it was changed in place since."""
        node = tensor.grad_fn
        if node is None:
            leaf = self._leaves.get(id(tensor))
            if leaf is None or leaf[0]() is not tensor or not leaf[1].same_version(tensor):
                return None
            return leaf[1]
        mark = _mark_at(node)
        if mark is None or (mark.output, mark.version) != (tensor.output_nr, tensor._version):
            return None
        return mark.saved()

    def keeps(self, tensor: Tensor) -> bool:
        """Whether who wants `tensor` would get the tensor itself, as far as is known."""
        saved = self.find(tensor)
        return saved is None or saved.kept

    def replayable(self, tensor: Tensor, replay: Replay, source: SavedTensor, *, depth: int) -> None:
        """From now on `tensor` need not be kept: it is `replay` of `source`."""
        saved = self.find(tensor) or self._add(tensor)
        if saved.kept and saved is not source:
            saved.compute(replay, source, depth=depth)

    def keep(self, tensor: Tensor) -> None:
        """Whoever wants `tensor` gets the tensor itself: what is computed from it starts here."""
        saved = self.find(tensor)
        if saved is not None and not saved.kept:
            saved.keep(tensor)

    def _add(self, tensor: Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        self._saved.append(saved)
        node = tensor.grad_fn
        if node is None:
            self._leaves[id(tensor)] = weakref.ref(tensor), saved
        else:
            metadata: Any = node.metadata  # a dict in truth; torch annotates a method
            metadata[_KEY] = _Mark(saved, tensor)
        return saved

    def _pack(self, tensor: Tensor) -> "SavedTensor | _Vector":
        if self._outer is None and tensor.dim() < 2:  # more than half of what a batch normalization saves
            return _Vector(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)
        saved = self.find(tensor)
        if saved is None:
            saved = self._add(tensor)
            source = _source_of_relu(tensor)
            if source is not None:
                saved.compute(F.relu, source, depth=source.depth)  # its second argument: whether in place
        saved.expect()
        return saved


class _Vector(NamedTuple):
    """A tensor that is kept: nothing is gained where it is computed again, and nobody has to find it."""

    tensor: Tensor
    version: int


def _unpack(saved: SavedTensor | _Vector) -> Tensor:
    if isinstance(saved, SavedTensor):
        return saved.take()
    require_version(saved.tensor, saved.version)
    return saved.tensor


def _mark_at(node: Any) -> _Mark | None:
    mark: _Mark | None = None if node is None else node.metadata.get(_KEY)
    return mark


def _source_of_relu(tensor: Tensor) -> SavedTensor | None:
    """What a rectifier, module or function, has made `tensor` of, if that is kept beside it or can be computed again."""
    node: Any = tensor.grad_fn
    if node is None or node.name() != "ReluBackward0" or not node.next_functions:
        return None
    previous, output = node.next_functions[0]
    mark = _mark_at(previous)
    if mark is None or mark.output != output:
        return None
    input, source = mark.tensor(), mark.saved()
    if input is None or source is None or (source.kept and input is tensor):
        return None
    # In place the input is the output, one version on. Any other version: somebody wrote to it outside the graph.
    return source if input._version == mark.version + (input is tensor) else None
