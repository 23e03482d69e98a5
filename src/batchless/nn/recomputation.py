"""Activation checkpointing seen from a layer whose forward changes its own state.

A checkpoint runs a forward a second time during the backward pass. A layer that moves running estimates in its forward
must then neither move them again nor use what later forwards have made of them.
"""

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KEPT_WITHOUT_GRAPH = 64
"""Forwards remembered where no autograd graph bounds their lifetime (a reentrant checkpoint's first run)."""


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, that is, whether a checkpoint is running it again."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(frozen=True, eq=False)
class _Forward:
    """What one forward saw and used; `eq=False` lets weak references hash it by identity."""

    shape: torch.Size
    fingerprint: Tensor
    used: Tensor
    replays: Tensor
    """How often it was recalled, 0-d: kept on the device, so that counting waits for nothing."""


class ForwardMemory:
    """What each forward of a layer used, found again by what it saw, for as long as a backward pass may ask.

    A forward's record lives as long as the autograd graph of its input. A forward without a graph (the first run of a
    reentrant checkpoint) is kept among the last 64.
    """

    def __init__(self) -> None:
        self._by_graph: list[weakref.ref[_Forward]] = []
        self._without_graph: deque[_Forward] = deque(maxlen=_KEPT_WITHOUT_GRAPH)

    def __reduce__(self) -> tuple[type["ForwardMemory"], tuple[()]]:
        """Copies and pickles of a layer start with an empty memory: their graphs are not this layer's."""
        return (ForwardMemory, ())

    def remember(self, input: Tensor, *, fingerprint: Tensor, used: Tensor) -> None:
        """Record that a forward on `input` saw `fingerprint` `[F]` and used the values `used` `[U]`."""
        replays = torch.zeros((), dtype=torch.long, device=used.device)
        record = _Forward(input.shape, fingerprint, used, replays)
        if input.grad_fn is None:
            self._without_graph.append(record)
            return
        metadata: Any = input.grad_fn.metadata  # a dict in truth; torch annotates a method
        metadata.setdefault("batchless_forwards", []).append(record)
        self._by_graph = [reference for reference in self._by_graph if reference() is not None]
        self._by_graph.append(weakref.ref(record))

    def recall(self, input: Tensor, fingerprint: Tensor) -> Tensor | None:
        """What the forward with this fingerprint used; None if nothing is remembered.

        Of forwards on bit-equal inputs, which cannot be told apart, the latest that was recalled least is taken: backward
        passes run checkpoints in reverse. (Equal inputs within one checkpoint come out in the wrong order.) Without a match
        the result is NaN: a forward that is not deterministic would otherwise give silently wrong gradients. No device is
        waited for.
        """
        alive = [record for reference in self._by_graph if (record := reference()) is not None]
        records = [record for record in alive + list(self._without_graph) if record.shape == input.shape]
        if not records:
            return None
        seen = torch.stack([record.fingerprint for record in records])
        distance = (seen - fingerprint).abs().sum(1)
        # Recomputation repeats the same kernels; the tolerance is for the few that add in no fixed order.
        matches = (distance == distance.min()) & (distance <= 1e-3 * fingerprint.abs().sum())
        replays = torch.stack([record.replays for record in records])
        age = torch.arange(len(records), 0, -1, device=replays.device)
        order = torch.where(matches, replays * len(records) + age, torch.iinfo(torch.long).max)
        chosen = order.argmin().reshape(1)
        for position, record in enumerate(records):
            record.replays.add_(chosen.squeeze() == position)
        used = torch.stack([record.used for record in records]).index_select(0, chosen).squeeze(0)
        return torch.where(matches.index_select(0, chosen), used, torch.nan)
