"""From a dataset of clips and a plan of micro-batches to the tensors of a training or evaluation loop.

As for images (`loading.py`), every random number of a clip is a function of (seed, epoch, index in the dataset).
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from batchless.data.augment import Augment, augmented, centred, erased_part
from batchless.data.clip_sampling import FrameSampling
from batchless.data.clips import ClipDataset
from batchless.data.loading import check_micro_batches, check_sizes, labels_of, prepared
from batchless.data.statistics import ChannelStatistics, normalized
from batchless.data.video_files import ClipFrames


class ClipBatch(NamedTuple):
    """Clips as the network sees them.

    Attributes:
        clips: float32 `[N, V, T, 3, S, S]`: V looks at each clip, of T frames.
        labels: int64 `[N]`.
        short: whether a clip has fewer frames than are wanted, so that some are repeated: bool `[N]`.
        damaged: whether a part of the clip could not be decoded: bool `[N]`.
    """

    clips: Tensor
    labels: Tensor
    short: Tensor
    damaged: Tensor


def clip_batches(
    dataset: ClipDataset,
    micro_batches: Sequence[Sequence[int]],
    *,
    seed: int,
    epoch: int,
    image_size: int,
    sampling: FrameSampling,
    augment: Augment | None,
    mean_std: ChannelStatistics,
    workers: int = 0,
    resize_to: int | None = None,
) -> Iterator[ClipBatch]:
    """A batch for each of `micro_batches`, in that order.

    Args:
        dataset: where the clips come from.
        micro_batches: for each batch the indices of its clips, one or more.
        seed: of the samples, with `epoch`.
        epoch: of the samples, with `seed`.
        image_size: S.
        sampling: which frames. At random, and one look (V = 1), where there is an `augment`.
        augment: what happens at random to each clip, the same to all of its frames. A mirrored "moves left" moves right:
            switch `flip` off where the class is a direction. None is for evaluation: the shorter side is resized to
            `resize_to`, and the central square taken.
        mean_std: by which frames are normalized.
        workers: processes that prepare batches; the values are the same. They end with the iterator.
        resize_to: for evaluation, the length of the shorter side before the central square is taken; None: S.

    Raises:
        ValueError: an argument out of range, at once; naming the clip when its turn comes, if it cannot be read or if its label
            is not one of the classes; a worker was killed.
    """
    check_sizes(image_size=image_size, workers=workers, resize_to=resize_to)
    check_micro_batches(micro_batches, len(dataset))
    loader = _ClipBatches(
        dataset,
        seed=seed,
        epoch=epoch,
        image_size=image_size,
        sampling=sampling,
        augment=augment,
        mean_std=mean_std,
        resize_to=resize_to,
    )
    return prepared(loader.batch, micro_batches, workers)


class _ClipBatches:
    """Batches by their lists of indices; what a worker process holds."""

    def __init__(
        self,
        dataset: ClipDataset,
        *,
        seed: int,
        epoch: int,
        image_size: int,
        sampling: FrameSampling,
        augment: Augment | None,
        mean_std: ChannelStatistics,
        resize_to: int | None,
    ) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.image_size, self.sampling, self.augment = image_size, sampling, augment
        self.mean_std, self.resize_to = mean_std, resize_to

    def batch(self, indices: Sequence[int]) -> ClipBatch:
        found = [self._clip(index) for index in indices]
        return ClipBatch(
            clips=torch.stack([clip for clip, _ in found]),
            labels=torch.tensor(labels_of(self.dataset, indices)),
            short=torch.tensor([frames.length < self.sampling.span for _, frames in found]),
            damaged=torch.tensor([frames.damaged for _, frames in found]),
        )

    def _clip(self, index: int) -> tuple[Tensor, ClipFrames]:
        """One clip `[V, T, 3, S, S]`, and what was read."""
        if self.augment is None:
            return evaluated_clip(
                self.dataset, index, self.sampling, self.image_size, resize_to=self.resize_to, mean_std=self.mean_std
            )
        augment, size = self.augment, self.image_size
        # A reader may choose twice (of a damaged file): the same random numbers each time.
        frames = self.dataset.clip(index, lambda length: self.sampling.for_training(length, self._rng("frames", index)))
        view = normalized(
            augmented(frames.images, size, augment=augment, rng=self._rng("augment", index)), self.mean_std
        )
        if augment.erasing and (part := erased_part(size, augment=augment, rng=self._rng("erase", index))):
            top, left, height, width = part
            view[..., top : top + height, left : left + width] = 0  # the mean colour
        return view[None], frames

    def _rng(self, purpose: str, index: int) -> Random:
        return Random(f"{purpose}/{self.seed}/{self.epoch}/{index}")


def evaluated_clip(
    dataset: ClipDataset,
    index: int,
    sampling: FrameSampling,
    image_size: int,
    *,
    mean_std: ChannelStatistics,
    resize_to: int | None = None,
) -> tuple[Tensor, ClipFrames]:
    """A clip as evaluation sees it: float32 `[V, T, 3, S, S]`, and the frames that were read, `[V * T, 3, H, W]`."""
    looks, frames = evaluated_frames(dataset, index, sampling, image_size, resize_to=resize_to)
    return normalized(looks, mean_std), frames


def evaluated_frames(
    dataset: ClipDataset, index: int, sampling: FrameSampling, image_size: int, *, resize_to: int | None = None
) -> tuple[Tensor, ClipFrames]:
    """The same before it is normalized: uint8."""
    frames = dataset.clip(index, lambda length: [place for view in sampling.for_evaluation(length) for place in view])
    squares = centred(frames.images, image_size, resize_to=resize_to)
    return squares.view(sampling.views, sampling.frames, *squares.shape[1:]), frames
