"""COCO's average precision (AP) of boxes and masks, over any number of batches and processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchless.data.object_loading import Sample
from batchless.data.objects import AnnotatedImage, packed_masks

Kind = Literal["box", "mask"]
SIZES = ("small", "medium", "large")
"""COCO's: areas below 32^2 pixels, below 96^2, and above."""

_AT_50, _AT_75 = 0, 5
"""Positions of these thresholds among COCO's: 0.50, 0.55, ..., 0.95."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """What a detector found in an image, m objects, on the CPU.

    Attributes:
        boxes: float32 `[m, 4]`: left, top, right, bottom in pixels of the image as it is stored.
        labels: int64 `[m]`, from 0.
        scores: float32 `[m]`.
        masks: of each object, in COCO's compressed run lengths; None: the detector has no masks.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageResult:
    """What is known of an image, and what was found in it.

    Attributes:
        index: of the image in the data set.
        known: without the image itself.
        found: by the detector.
    """

    index: int
    known: AnnotatedImage
    found: Detections


@dataclass(frozen=True, kw_only=True, eq=False)
class Precision:
    """Average precision in all its parts.

    Attributes:
        parts: float64 `[10, K, 4]`: by threshold of the overlap (0.50 to 0.95), class, and size (all, small, medium, large):
            the mean of the precision over 101 recalls. NaN where no such object is in the images.
    """

    parts: Tensor

    def of_class(self, label: int) -> float | None:
        """AP of a class; None if no object of it is in the images."""
        return _mean(self.parts[:, label, 0])

    def figures(self, prefix: str) -> dict[str, float]:
        """`<prefix>ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, 0 to 1; sizes without an object are absent."""
        parts = self.parts
        found = {"ap": parts[:, :, 0], "ap50": parts[_AT_50, :, 0], "ap75": parts[_AT_75, :, 0]}
        found |= {f"ap_{size}": parts[:, :, number] for number, size in enumerate(SIZES, start=1)}
        means = {f"{prefix}{name}": _mean(values) for name, values in found.items()}
        return {name: value for name, value in means.items() if value is not None}


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


@dataclass
class AveragePrecision:
    """COCO's AP of boxes, and of masks where the detector has them: the metric of detection.

    Attributes:
        classes: their number.
        masks: whether masks are compared too.
        results: of the images so far, in order.
    """

    classes: int
    masks: bool
    results: list[ImageResult] = field(default_factory=list)

    def update(self, model: nn.Module, batch: Sequence[Sample]) -> None:
        """Add the images of `batch`, which have `known`."""
        for sample, output in zip(batch, model([sample.image for sample in batch]), strict=True):
            assert sample.known is not None
            found = detections(output, masks=self.masks)
            self.results.append(ImageResult(index=sample.index, known=sample.known, found=found))

    def merge(self, later: "AveragePrecision") -> None:
        """Add the images of `later`, which come after this one's."""
        self.results += later.results

    def precision(self, kind: Kind) -> Precision:
        """AP of boxes or masks in all its parts."""
        return average_precision(self.results, self.classes, kind)

    def compute(self) -> dict[str, float]:
        """`ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` of boxes; with masks `mask_ap`, ... too.

        0 to 1; a size of which there is no object is absent. Without any object at all: `ap` of 0 alone. There is
        no loss: torchvision's detectors compute theirs in training mode only, on regions drawn at random.
        """
        figures = self.precision("box").figures("")
        if self.masks:
            figures |= self.precision("mask").figures("mask_")
        return figures or {"ap": 0.0}


def detections(output: Mapping[str, Tensor], *, masks: bool) -> Detections:
    """What torchvision's detectors give for an image, without the background: label 1 there is label 0 here."""
    objects = output["labels"] > 0
    packed = None
    if masks:
        packed = packed_masks((output["masks"][objects, 0] >= 0.5).to(torch.uint8).cpu())
    return Detections(
        boxes=output["boxes"][objects].float().cpu(),
        labels=output["labels"][objects].cpu() - 1,
        scores=output["scores"][objects].float().cpu(),
        masks=packed,
    )


def average_precision(results: Sequence[ImageResult], classes: int, kind: Kind) -> Precision:
    """COCO's AP by faster-coco-eval, at most 100 detections an image; crowds are neither hit nor missed.

    Args:
        results: of all images.
        classes: K.
        kind: whether boxes or masks are compared.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth, found = coco_records(results, classes, kind)
    known = COCO(truth)
    # `loadRes` needs at least one detection.
    predicted = known.loadRes(found) if found else COCO({**truth, "annotations": []})
    evaluation = COCOeval_faster(
        known, predicted, "bbox" if kind == "box" else "segm", print_function=_silent, rle_iou_max_workers=1
    )
    evaluation.evaluate()
    evaluation.accumulate()
    # [threshold, recall, class, size, most detections]; -1 where there is nothing to find.
    precision = torch.as_tensor(evaluation.eval["precision"], dtype=torch.float64)[..., -1]
    return Precision(parts=torch.where(precision < 0, torch.nan, precision).mean(1))


def coco_records(
    results: Sequence[ImageResult], classes: int, kind: Kind
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is known and what was found, as COCO's tools take them: the content of an `instances_*.json`, and of results.

    Images are numbered from 1 in the order of `results`, categories from 1 in that of the labels.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, result in enumerate(results, start=1):
        known = result.known
        images.append({"id": image, "height": known.height, "width": known.width})
        for index in range(len(known)):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": int(known.labels[index]) + 1,
                "bbox": _corner_and_size(known.boxes[index]),
                "area": float(known.areas[index]),
                "iscrowd": int(known.crowd[index]),
            }
            if kind == "mask":
                annotation["segmentation"] = known.run_lengths(index)
            annotations.append(annotation)
        for index in range(len(result.found.labels)):
            record: dict[str, Any] = {
                "image_id": image,
                "category_id": int(result.found.labels[index]) + 1,
                "score": float(result.found.scores[index]),
            }
            if kind == "mask":  # without the box, whose area would otherwise decide on small, medium and large
                assert result.found.masks is not None
                record["segmentation"] = result.found.masks[index]
            else:
                record["bbox"] = _corner_and_size(result.found.boxes[index])
            found.append(record)
    categories = [{"id": label + 1, "name": str(label)} for label in range(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}, found


def _corner_and_size(box: Tensor) -> list[float]:
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]


def _silent(*words: object) -> None:
    """The library's progress, which goes nowhere."""
