"""Predictions to look at: the worst and the typical ones, not the best."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from batchless.data import ImageDataset
from batchless.data.augment import centred
from batchless.runs.atomic import reason, write_text
from batchless.tasks.accuracy import PerImage

PREDICTIONS = "predictions.json"
_OF_EACH_KIND = 8
_LARGEST_SIDE = 160


def write_predictions(folder: Path, found: PerImage, images: ImageDataset, *, image_size: int | None) -> None:
    """Write pictures of some predictions into `folder`, and `predictions.json`, which tells what they show.

    The worst are those of the largest loss; the typical ones those whose loss is nearest to the median. Each picture is the
    square that the network saw, at most 160 pixels wide.

    Args:
        folder: made if it is missing.
        found: for each of `images`, in order.
        images: what was predicted.
        image_size: side of the square that the network saw; None: the images are what it saw, and shown as they are.

    Raises:
        ValueError: the folder cannot be written, or an image cannot be read again.
    """
    from PIL import Image

    chosen = worst_and_typical(found.loss.argsort(descending=True, stable=True).tolist())
    records = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (kind, index) in enumerate(chosen):
            picture = f"{number:02}-{kind}.png"
            seen = images.image(index)
            if image_size is not None:
                seen = centred(seen, min(image_size, _LARGEST_SIDE))
            Image.fromarray(seen.permute(1, 2, 0).numpy()).save(folder / picture)
            records.append(
                {
                    "kind": kind,
                    "picture": picture,
                    "truth": images.classes[images.label(index)],
                    "predicted": images.classes[int(found.predicted[index])],
                    "confidence": round(_finite(found.confidence[index]), 6),
                    "source": images.source(index),
                }
            )
    except OSError as error:
        raise ValueError(f"cannot write pictures into {folder}: {reason(error)}") from error
    write_text(folder / PREDICTIONS, json.dumps(records, indent=1) + "\n")


def worst_and_typical(order: Sequence[int]) -> list[tuple[str, int]]:
    """What is pictured of images in the order of how bad they are: the first eight, and the eight in the middle."""
    middle = len(order) // 2
    typical = order[max(middle - _OF_EACH_KIND // 2, 0) : middle + _OF_EACH_KIND // 2]
    return [("worst", number) for number in order[:_OF_EACH_KIND]] + [("typical", number) for number in typical]


def save_jpeg(image: Tensor, path: Path) -> None:
    """Write an image uint8 `[3, H, W]`; as PNG, photos would be too large for a report."""
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, quality=88)


def _finite(value: Tensor) -> float:
    return float(torch.nan_to_num(value))
