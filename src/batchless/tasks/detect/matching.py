"""Which detections hit, at an overlap of one half: for pictures and one readable number per image, not for AP."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchless.tasks.detect.average_precision import ImageResult

_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """An image's detections against its objects.

    Attributes:
        scores: float32 `[m]`, of the detections that count (those that lie in a crowd are neither right nor wrong).
        hit: bool `[m]`, whether each found an object of its class that no better one had found.
        objects: how many there are to find.
    """

    scores: Tensor
    hit: Tensor
    objects: int

    def f1(self, threshold: float) -> float:
        """`2 hits / (detections + objects)` with the detections of at least that score; 1 where there are neither."""
        shown = self.scores >= threshold
        total = int(shown.sum()) + self.objects
        return 2 * int(self.hit[shown].sum()) / total if total else 1.0


def matched(result: ImageResult) -> Match:
    """Deal out the objects to the detections, the surest first, each to the best overlap of at least one half in its class."""
    from torchvision.ops import box_iou

    known, found = result.known, result.found
    order = found.scores.argsort(descending=True, stable=True)
    boxes, labels = found.boxes[order], found.labels[order]
    overlap = box_iou(boxes, known.boxes)
    overlap[labels[:, None] != known.labels[None]] = 0
    free = ~known.crowd
    hit = torch.zeros(len(order), dtype=torch.bool)
    counts = torch.ones(len(order), dtype=torch.bool)
    for rank in range(len(order)):
        candidates = torch.where(free, overlap[rank], 0)
        best = int(candidates.argmax()) if len(candidates) else 0
        if len(candidates) and candidates[best] >= _OVERLAP:
            hit[rank], free[best] = True, False
        else:
            counts[rank] = not _in_crowd(boxes[rank], known.boxes[known.crowd & (known.labels == labels[rank])])
    return Match(scores=found.scores[order][counts], hit=hit[counts], objects=int((~known.crowd).sum()))


def best_threshold(matches: Sequence[Match]) -> float:
    """The score from which on detections are best shown: that with the largest F1 over all images; 0.5 without detections."""
    scores = torch.cat([match.scores for match in matches]) if matches else torch.zeros(0)
    if not len(scores):
        return 0.5
    hit = torch.cat([match.hit for match in matches])
    order = scores.argsort(descending=True, stable=True)
    hits = hit[order].cumsum(0)
    objects = sum(match.objects for match in matches)
    f1 = 2 * hits / (torch.arange(1, len(order) + 1) + objects)
    return float(scores[order][f1.argmax()])


def _in_crowd(box: Tensor, crowds: Tensor) -> bool:
    """Whether at least half of the box lies in one of the crowds."""
    corner = torch.maximum(box[:2], crowds[:, :2])
    size = (torch.minimum(box[2:], crowds[:, 2:]) - corner).clamp_min(0)
    area = (box[2:] - box[:2]).prod().clamp_min(1e-9)
    return bool((size.prod(1) / area >= _OVERLAP).any())
