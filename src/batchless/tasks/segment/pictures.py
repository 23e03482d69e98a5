"""Label maps to look at, beside the truth: the worst and the typical ones, not the best."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from batchless.data.label_classes import label_colours
from batchless.data.label_maps import IGNORED, LabelMaps
from batchless.runs.atomic import reason, write_text
from batchless.tasks.pictures import PREDICTIONS, save_jpeg, worst_and_typical
from batchless.tasks.segment.confusion import Mapped

_LARGEST_SIDE = 320
_OPACITY = 0.6
_GAP = 4
_NAMED = 3  # classes in a line


def write_label_maps(folder: Path, mapped: Sequence[Mapped], images: LabelMaps) -> None:
    """Write pictures (the image, the truth, the prediction), and `predictions.json`, which tells what they show.

    The worst images are those of the smallest mIoU over their own classes; the typical ones are nearest to the median.
    Ignored pixels are white in the truth.

    Args:
        folder: made if it is missing.
        mapped: predictions.
        images: which were predicted.

    Raises:
        ValueError: the folder cannot be written, or an image cannot be read again.
    """
    order = sorted(range(len(mapped)), key=lambda number: (mapped[number].miou, number))
    records = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for position, (kind, number) in enumerate(worst_and_typical(order)):
            found = mapped[number]
            image, truth = images.sample(found.index)
            predicted = found.prediction()
            panels = [_shown(image), coloured(image, truth, images.classes), coloured(image, predicted, images.classes)]
            gap = torch.full((3, panels[0].shape[1], _GAP), 255, dtype=torch.uint8)
            picture = f"{position:02}-{kind}.jpg"
            save_jpeg(torch.cat([panels[0], gap, panels[1], gap, panels[2]], 2), folder / picture)
            records.append(
                {
                    "kind": kind,
                    "picture": picture,
                    "truth": told_shares(shares(truth, images.classes)),
                    "predicted": told_shares(shares(predicted, images.classes)),
                    "confidence": round(found.miou, 6),
                    "measure": "mIoU",
                    "source": images.source(found.index),
                }
            )
    except OSError as error:
        raise ValueError(f"cannot write pictures into {folder}: {reason(error)}") from error
    write_text(folder / PREDICTIONS, json.dumps(records, indent=1) + "\n")


def coloured(
    image: Tensor, labels: Tensor, classes: Sequence[str], *, largest_side: int | None = _LARGEST_SIDE
) -> Tensor:
    """The image under the colours of its labels, ignored pixels white: uint8 `[3, h, w]`.

    Args:
        image: uint8 `[3, H, W]`.
        labels: uint8 of any size, which is that of the image in its shape.
        classes: names, by which colours are chosen.
        largest_side: to which larger images are reduced; None: they are not.
    """
    canvas = _shown(image, largest_side)
    size = list(canvas.shape[1:])
    labels = functional.resize(labels[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
    table = torch.full((IGNORED + 1, 3), 255, dtype=torch.uint8)
    table[: len(classes)] = label_colours(classes)
    paint = table[labels.long()].permute(2, 0, 1)
    return torch.lerp(canvas.float(), paint.float(), _OPACITY).round().to(torch.uint8)


def _shown(image: Tensor, largest_side: int | None = _LARGEST_SIDE) -> Tensor:
    scale = 1.0 if largest_side is None else min(largest_side / max(image.shape[1:]), 1.0)
    if scale == 1.0:
        return image
    size = [max(round(side * scale), 1) for side in image.shape[1:]]
    result: Tensor = functional.resize(image, size, antialias=True)
    return result


def shares(labels: Tensor, classes: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """The classes in a label map and their share of its valid pixels, the largest first."""
    counts = labels.flatten().long().bincount(minlength=IGNORED + 1)[: len(classes)]
    total = max(int(counts.sum()), 1)
    order = counts.argsort(descending=True, stable=True).tolist()
    return tuple((classes[label], int(counts[label]) / total) for label in order if counts[label])


def told_shares(found: Sequence[tuple[str, float]]) -> str:
    """The largest shares in words, such as `road 60 %, car 30 %, ...`.

    >>> told_shares([("road", 0.6), ("car", 0.3), ("sky", 0.08), ("tree", 0.02)])
    'road 60 %, car 30 %, sky 8 %, ...'
    """
    words = [f"{name} {100 * share:.0f} %" for name, share in found[:_NAMED]]
    return ", ".join([*words, *(["..."] if len(found) > _NAMED else [])]) or "nothing"
