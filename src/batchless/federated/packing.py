"""Many tensors as one: what travels between processes is one buffer and a list of what lies where."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from batchless.federated.update import Update

_SHARED_MEMORY = Path("/dev/shm")
_ALIGNMENT = 64
"""Bytes; as torch's own memory is, so that a view can be of any type and is read as fast."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a buffer.

    Attributes:
        name: of the tensor.
        dtype: of the tensor.
        shape: of the tensor.
        begin: its first byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        """Its length."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Packed:
    """Tensors by name in one buffer of bytes; each process that has it writes and reads the same ones where it is shared.

    >>> packed = Packed.of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)})
    >>> packed.tensors()
    {'a': tensor([1., 2.]), 'b': tensor(3)}
    """

    places: tuple[Place, ...]
    buffer: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Packed":
        """Copies of the tensors, on the CPU."""
        places = []
        end = 0
        for name, tensor in tensors.items():
            place = Place(name, tensor.dtype, tuple(tensor.shape), end)
            places.append(place)
            end += -(-place.bytes // _ALIGNMENT) * _ALIGNMENT
        packed = cls(tuple(places), torch.empty(end, dtype=torch.uint8))
        packed.write(tensors)
        return packed

    def in_shared_memory(self) -> "Packed":
        """Itself, its buffer moved to where other processes can map it."""
        self.buffer.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the values of tensors that fit in their places."""
        fitting = written(tensors, self.tensors())
        assert fitting

    def tensors(self) -> dict[str, Tensor]:
        """Views of the buffer, by name."""
        return {
            place.name: self.buffer[place.begin : place.begin + place.bytes].view(place.dtype).view(place.shape)
            for place in self.places
        }


def written(tensors: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> bool:
    """Copy tensors into views; False, and no copy, unless both have the same names, types and shapes in the same order.

    Making the views of a buffer takes as long as copying a small network: who writes often keeps them.
    """
    into, given = list(views.values()), list(tensors.values())
    if list(views) != list(tensors) or any(
        view.dtype != tensor.dtype or view.shape != tensor.shape for view, tensor in zip(into, given, strict=True)
    ):
        return False
    if into:
        torch._foreach_copy_(into, given)
    return True


def tensors_of(update: Update) -> dict[str, Tensor]:
    """All tensors of an update, under one name each."""
    tensors = {f"values/{name}": value for name, value in update.values.items()}
    tensors |= {f"counters/{name}": value for name, value in update.counters.items()}
    return tensors | {f"local/{name}": value for name, value in joined_locals(update.local).items()}


def without_tensors(update: Update) -> Update:
    """The rest of it: some numbers."""
    return replace(update, values={}, counters={}, local={})


def with_tensors(rest: Update, tensors: Mapping[str, Tensor]) -> Update:
    """The update again; its values are those in `tensors`, its counters and local tensors are copies.

    >>> update = Update(weight=2.0, values={"w": torch.ones(2)}, local={3: {"a/b": torch.zeros(1)}})
    >>> again = with_tensors(without_tensors(update), tensors_of(update))
    >>> again.weight, again.values, again.local
    (2.0, {'w': tensor([1., 1.])}, {3: {'a/b': tensor([0.])}})
    """
    groups: dict[str, dict[str, Tensor]] = {"values": {}, "counters": {}, "local": {}}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups[group][name] = tensor if group == "values" else tensor.clone()
    local = separate_locals(groups["local"])
    return replace(rest, values=groups["values"], counters=groups["counters"], local=local)


def joined_locals(locals: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The clients' own tensors, under one name each."""
    return {f"{client}/{name}": value for client, local in locals.items() for name, value in local.items()}


def separate_locals(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The inverse of `joined_locals`; no copies."""
    locals: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        client, _, name = key.partition("/")
        locals.setdefault(int(client), {})[name] = tensor
    return locals


def require_shared_memory(state: Mapping[str, Tensor], count: int, *, clipped: bool) -> None:
    """ValueError if there is no room for two updates of each of `count` workers and the state.

    A full /dev/shm would end the process without a word. Updates that are `clipped` are in float64.
    """
    if not _SHARED_MEMORY.is_dir():  # another system than Linux
        return
    own = sum(tensor.nbytes for tensor in state.values())
    needed = own + 2 * count * (8 * sum(tensor.numel() for tensor in state.values()) if clipped else own)
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"{count} workers need about {needed >> 20} MB in {_SHARED_MEMORY}, {free >> 20} MB are free: "
            "use fewer workers, or give the container more (docker run --shm-size)"
        )
