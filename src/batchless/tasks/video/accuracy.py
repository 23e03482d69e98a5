"""How many clips are recognized, over any number of batches."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.data.clip_loading import ClipBatch
from batchless.models.video import clip_input
from batchless.tasks.accuracy import PerImage

_TOP = 5


def clip_scores(model: nn.Module, batch: ClipBatch) -> Tensor:
    """Scores `[N, classes]`: those of each look at a clip, averaged."""
    count, views = batch.clips.shape[:2]
    scores: Tensor = model(clip_input(model, batch.clips.flatten(0, 1)))
    return scores.view(count, views, -1).mean(1)


@dataclass
class ClipAccuracy:
    """Share of clips whose label has the highest score, or one of the five highest, and the mean cross-entropy.

    The scores of several looks at a clip are averaged before anything else.
    """

    parts: list[Tensor] = field(default_factory=list)

    def update(self, model: nn.Module, batch: ClipBatch) -> None:
        """Add clips."""
        scores = clip_scores(model, batch).float()
        confidence, predicted = scores.softmax(1).max(1)
        loss = F.cross_entropy(scores, batch.labels, reduction="none")
        top = scores.topk(min(_TOP, scores.shape[1]), dim=1).indices
        among_top = (top == batch.labels[:, None]).any(1)
        columns = (
            loss,
            predicted,
            confidence,
            predicted == batch.labels,
            among_top,
            batch.labels,
            batch.short,
            batch.damaged,
        )
        # One tensor on the device: nothing is waited for until `compute`. Classes below 2^24 are exact in float32.
        self.parts.append(torch.stack([column.float() for column in columns]))

    def merge(self, later: "ClipAccuracy") -> None:
        """Add the clips of `later`, which come after this one's."""
        self.parts = [part.cpu() for part in (*self.parts, *later.parts)]

    def _columns(self) -> Tensor:
        return torch.cat([part.cpu() for part in self.parts], 1) if self.parts else torch.zeros(8, 0)

    def per_image(self) -> PerImage:
        """What was found for each clip."""
        loss, predicted, confidence, correct, *_ = self._columns()
        return PerImage(loss=loss, predicted=predicted.long(), confidence=confidence, correct=correct.bool())

    def compute(self) -> dict[str, float]:
        """`accuracy` (top-1) and `top5` from 0 to 1; `class_accuracy`, its mean over classes; `loss`; how many clips are what.

        `short_clips` have too few frames, so that some came twice; of `damaged_clips` a part could not be decoded.
        """
        loss, _, _, correct, among_top, labels, short, damaged = self._columns().double()
        count = max(len(loss), 1)
        by_class = [float(correct[labels == label].mean()) for label in labels.unique()]
        return {
            "accuracy": float(correct.sum()) / count,
            "top5": float(among_top.sum()) / count,
            "class_accuracy": sum(by_class) / max(len(by_class), 1),
            "loss": float(loss.sum()) / count,
            "short_clips": float(short.sum()),
            "damaged_clips": float(damaged.sum()),
        }
