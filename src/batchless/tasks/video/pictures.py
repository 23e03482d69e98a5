"""Clips as strips of frames, to look at with their predictions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchless.data.augment import centred
from batchless.data.clip_sampling import FrameSampling
from batchless.data.clips import ClipDataset

_MOST_FRAMES = 8
_LARGEST_SIDE = 96


@dataclass(frozen=True, kw_only=True, eq=False)
class Strips:
    """Each clip as one picture, its frames side by side in time: a `batchless.data.ImageDataset`.

    Attributes:
        clips: what is shown.
        sampling: up to eight of the frames that evaluation takes are shown, of the look in the middle.
        image_size: side of the square that the network sees; at most 96 pixels are shown.
        resize_to: the shorter side of a clip before its central square is taken; None: image_size.
    """

    clips: ClipDataset
    sampling: FrameSampling
    image_size: int
    resize_to: int | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the clips."""
        return self.clips.classes

    def __len__(self) -> int:
        return len(self.clips)

    def image(self, index: int) -> Tensor:
        """The strip: uint8 `[3, s, n * s]`."""
        frames = self.clips.clip(index, self._shown).images
        squares = centred(frames, self.image_size, resize_to=self.resize_to)
        if self.image_size > _LARGEST_SIDE:
            squares = centred(squares, _LARGEST_SIDE)
        return torch.cat(list(squares), dim=2)

    def _shown(self, length: int) -> list[int]:
        views = self.sampling.for_evaluation(length)
        view = views[len(views) // 2]
        count = min(len(view), _MOST_FRAMES)
        return [view[number * len(view) // count] for number in range(count)]

    def label(self, index: int) -> int:
        """The index of the clip's class in `classes`."""
        return self.clips.label(index)

    def source(self, index: int) -> str:
        """Where the clip comes from."""
        return self.clips.source(index)
