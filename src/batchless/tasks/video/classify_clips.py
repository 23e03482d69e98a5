"""Classification of clips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from batchless.data import Augment, ChannelStatistics, epoch_order
from batchless.data.clip_loading import ClipBatch, clip_batches
from batchless.data.clip_sampling import FrameSampling
from batchless.data.clips import ClipDataset
from batchless.tasks.pictures import write_predictions
from batchless.tasks.video.accuracy import ClipAccuracy, clip_scores
from batchless.tasks.video.pictures import Strips

_EVALUATION_FRAMES_PER_FORWARD = 128


@dataclass(frozen=True, kw_only=True)
class ClipData:
    """Batches of labelled clips; a `batchless.train.Data` whose images are clips.

    Attributes:
        train_clips: clips to learn from.
        test_clips: clips to evaluate on.
        image_size: S, the square that the network sees, in pixels.
        sampling: which frames it sees.
        augment: what happens at random to a training clip, the same to all its frames.
        resize_to: the shorter side of a test clip before its central square is taken; None: S.
        statistics: by which frames are normalized.
        seed: of order, frames and augmentation.
        workers: processes that prepare batches; 0: this one.
    """

    train_clips: ClipDataset
    test_clips: ClipDataset
    image_size: int
    sampling: FrameSampling
    augment: Augment
    statistics: ChannelStatistics
    seed: int
    resize_to: int | None = None
    workers: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.train_clips.classes

    def order(self, epoch: int) -> Sequence[int]:
        """The training clips in the order in which the epoch shows them."""
        return epoch_order(len(self.train_clips), seed=self.seed, epoch=epoch)

    def train(self, epoch: int, micro_batches: Sequence[Sequence[int]]) -> Iterator[ClipBatch]:
        """A batch for each list of training clips."""
        return self._batches(self.train_clips, micro_batches, epoch=epoch, augment=self.augment)

    @property
    def test_images_count(self) -> int:
        """Test clips."""
        return len(self.test_clips)

    def test(self, part: range) -> Iterator[ClipBatch]:
        """The test clips in `part`, in order."""
        size = max(_EVALUATION_FRAMES_PER_FORWARD // (self.sampling.frames * self.sampling.views), 1)
        chunks = [part[at : at + size] for at in range(0, len(part), size)]
        return self._batches(self.test_clips, chunks, epoch=0, augment=None)

    def _batches(
        self, clips: ClipDataset, micro_batches: Sequence[Sequence[int]], *, epoch: int, augment: Augment | None
    ) -> Iterator[ClipBatch]:
        return clip_batches(
            clips,
            micro_batches,
            seed=self.seed,
            epoch=epoch,
            image_size=self.image_size,
            sampling=self.sampling,
            augment=augment,
            mean_std=self.statistics,
            workers=self.workers,
            resize_to=self.resize_to,
        )


@dataclass(kw_only=True)
class ClassifyClips:
    """Cross-entropy and accuracy of clips; a `batchless.train.Task` that counts clips.

    Attributes:
        data: whose test clips are pictured with their predictions; None: no pictures.
        label_smoothing: share of a label that is spread evenly over all classes.
    """

    data: ClipData | None = None
    label_smoothing: float = 0.0

    @property
    def main_figure(self) -> str:
        """`accuracy`, of the highest score."""
        return "accuracy"

    def loss(self, model: nn.Module, batch: ClipBatch) -> tuple[Tensor, int]:
        """Summed cross-entropy, and the number of clips."""
        scores = clip_scores(model, batch)
        loss = F.cross_entropy(scores, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)
        return loss, len(batch.labels)

    def images(self, batch: ClipBatch) -> int:
        """Number of clips."""
        return len(batch.labels)

    def metric(self) -> ClipAccuracy:
        """Accuracy and loss."""
        return ClipAccuracy()

    def to(self, batch: ClipBatch, device: str) -> ClipBatch:
        """The batch on the device."""
        return ClipBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def picture(self, metric: ClipAccuracy, folder: Path) -> None:
        """Strips of frames of the worst and of typical predictions."""
        if self.data is not None:
            data = self.data
            strips = Strips(
                clips=data.test_clips, sampling=data.sampling, image_size=data.image_size, resize_to=data.resize_to
            )
            write_predictions(folder, metric.per_image(), strips, image_size=None)
