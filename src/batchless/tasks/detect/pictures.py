"""Detections to look at, beside the truth: the worst and the typical ones, not the best."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from batchless.data.objects import DetectionImages
from batchless.runs.atomic import reason, write_text
from batchless.tasks.detect.average_precision import Detections, ImageResult
from batchless.tasks.detect.matching import best_threshold, matched
from batchless.tasks.pictures import PREDICTIONS, save_jpeg, worst_and_typical

_LARGEST_SIDE = 320
_SMALLEST_SIDE = 192  # smaller images are enlarged, so that names can be read
_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#46f0f0",
    "#f032e6",
    "#bcf60c",
    "#fabebe",
    "#008080",
)


def write_detections(folder: Path, results: Sequence[ImageResult], images: DetectionImages) -> None:
    """Write pictures, truth left and detections right, and `predictions.json`, which tells what they show.

    Detections are shown from the score on that has the largest F1 over all images. The worst images are those of the
    smallest F1, among equals those with most objects; the typical ones are nearest to the median.

    Args:
        folder: made if it is missing.
        results: of the images.
        images: which were predicted.

    Raises:
        ValueError: the folder cannot be written, or an image cannot be read again.
    """
    matches = [matched(result) for result in results]
    threshold = best_threshold(matches)
    f1 = [match.f1(threshold) for match in matches]
    order = sorted(range(len(results)), key=lambda number: (f1[number], -matches[number].objects, number))
    records = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for position, (kind, number) in enumerate(worst_and_typical(order)):
            result = results[number]
            annotated = images.images[result.index]
            image = annotated.image()
            truth = Detections(
                boxes=annotated.boxes,
                labels=annotated.labels,
                scores=torch.ones(len(annotated)),
                masks=None
                if annotated.segmentations is None or result.found.masks is None
                else tuple(annotated.run_lengths(index) for index in range(len(annotated))),
            )
            left = drawn(image, truth, images.classes, threshold=0.0, scores=False)
            right = drawn(image, result.found, images.classes, threshold=threshold)
            picture = f"{position:02}-{kind}.jpg"
            save_jpeg(
                torch.cat([left, torch.full((3, left.shape[1], 4), 255, dtype=torch.uint8), right], 2), folder / picture
            )
            shown = result.found.labels[result.found.scores >= threshold]
            records.append(
                {
                    "kind": kind,
                    "picture": picture,
                    "truth": counted(annotated.labels, images.classes),
                    "predicted": counted(shown, images.classes),
                    "confidence": round(f1[number], 6),
                    "measure": "F1",
                    "source": annotated.source,
                }
            )
    except OSError as error:
        raise ValueError(f"cannot write pictures into {folder}: {reason(error)}") from error
    write_text(folder / PREDICTIONS, json.dumps(records, indent=1) + "\n")


def drawn(image: Tensor, found: Detections, classes: Sequence[str], *, threshold: float, scores: bool = True) -> Tensor:
    """The image uint8 `[3, H, W]` with boxes, names and masks of the detections of at least that score, resized to be seen."""
    height, width = image.shape[1:]
    scale = min(max(_SMALLEST_SIDE / min(height, width), 1.0), _LARGEST_SIDE / max(height, width))
    size = [max(round(height * scale), 1), max(round(width * scale), 1)]
    canvas: Tensor = functional.resize(image, size, antialias=True)
    shown = (found.scores >= threshold).nonzero().flatten().tolist()
    if not shown:
        return canvas
    labels = found.labels[shown].tolist()
    colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
    if found.masks is not None:
        masks = functional.resize(_decoded([found.masks[index] for index in shown]), size).bool()
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.45, colors=colours)
    names = [
        f"{classes[label]} {found.scores[index]:.2f}" if scores else classes[label]
        for index, label in zip(shown, labels, strict=True)
    ]
    result: Tensor = draw_bounding_boxes(
        canvas, found.boxes[shown] * scale, labels=names, colors=colours, width=2, fill_labels=True
    )
    return result


def counted(labels: Tensor, classes: Sequence[str]) -> str:
    """How many objects of which classes, such as `2 x RBC, 1 x WBC`, or `nothing`."""
    counts = Counter(labels.tolist())
    return ", ".join(f"{count} x {classes[label]}" for label, count in sorted(counts.items())) or "nothing"


def _decoded(masks: list[dict[str, Any]]) -> Tensor:
    from faster_coco_eval.core import mask as coder

    return torch.from_numpy(coder.decode(masks)).permute(2, 0, 1).contiguous()
