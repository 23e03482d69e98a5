"""Which frames of a clip a network sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """So many frames of a clip, spread over all of it or close together.

    Attributes:
        frames: T, how many the network sees.
        way: `segments`: the clip is cut into T equal segments, and one frame is taken of each (arXiv 1608.00859; TSM): at
            random for training, in the middle for evaluation. `dense`: every `stride`-th frame from some frame on, as 3D
            networks are trained: from a random one for training, around the middle for evaluation.
        stride: of `dense`, in frames.
        views: how many times each clip is looked at in evaluation; the scores are averaged. View v of V takes the frame at
            `(v + 1/2) / V` of each segment, or begins there in the room that the window has.

    Raises:
        ValueError: a number below 1.

    >>> sampling = FrameSampling(frames=4)
    >>> sampling.for_evaluation(40), sampling.for_evaluation(2)
    (((5, 15, 25, 35),), ((0, 0, 1, 1),))
    """

    frames: int = 8
    way: Literal["segments", "dense"] = "segments"
    stride: int = 2
    views: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if self.way not in ("segments", "dense"):
            raise ValueError(f"way={self.way!r}: there are 'segments' and 'dense'")

    @property
    def span(self) -> int:
        """How many frames a clip must have so that none is shown twice."""
        return self.frames if self.way == "segments" else 1 + (self.frames - 1) * self.stride

    def for_training(self, length: int, rng: Random) -> Sequence[int]:
        """T positions in a clip of `length` frames, rising; some come twice where it has fewer."""
        if self.way == "dense":
            return self._window(int(rng.random() * (self._room(length) + 1)), length)
        starts = [length * number // self.frames for number in range(self.frames + 1)]
        return tuple(min(start + int(rng.random() * (end - start)), length - 1) for start, end in pairwise(starts))

    def for_evaluation(self, length: int) -> Sequence[Sequence[int]]:
        """The positions of each view."""
        if self.way == "dense":
            starts = [int(self._room(length) * self._share(view)) for view in range(self.views)]
            return tuple(self._window(start, length) for start in starts)
        return tuple(
            tuple(int(length * (number + self._share(view)) / self.frames) for number in range(self.frames))
            for view in range(self.views)
        )

    def _share(self, view: int) -> float:
        return (view + 0.5) / self.views

    def _room(self, length: int) -> int:
        """How many frames the window can begin later."""
        return max(length - self.span, 0)

    def _window(self, start: int, length: int) -> Sequence[int]:
        return tuple(min(start + number * self.stride, length - 1) for number in range(self.frames))
