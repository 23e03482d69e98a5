"""Detectors in ONNX, for one image of any size, and when two of them find the same."""

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from batchless.deploy.about import About
from batchless.deploy.formats import finished_onnx, first_line
from batchless.models.detectors import DetectorInput, DetectorSettings

_OPSET = 18
_ROUNDING = 1e-4
"""Scores this near to a limit may be on either side of it."""

Objects = dict[str, Tensor]
"""`boxes` `[D, 4]`, `labels` `[D]`, `scores` `[D]`, and with masks `masks` `[D, 1, H, W]`."""


def of_one_image(detector: nn.Module, image: Tensor) -> Objects:
    """What a detector finds in an image `[3, H, W]`."""
    found: Objects = detector([image])[0]
    return found


class DetectorGraph(nn.Module):
    """A detector for one image that has its size already; a graph holds no lists of images, nor how the detector resizes them.

    Args:
        detector: folded; it resizes no more.
        outputs: names of what it tells, in order.
    """

    def __init__(self, detector: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        transform: Any = detector.transform
        assert isinstance(transform, DetectorInput)
        transform.resizes = False
        self.detector, self.outputs = detector, outputs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs for an image `[3, H, W]`."""
        found = of_one_image(self.detector, image)
        return tuple(found[name] for name in self.outputs)


def detector_onnx_bytes(detector: nn.Module, example: Tensor, about: About, *, opset: int | None) -> bytes:
    """The content of an `.onnx` file whose input is one image `[3, H, W]` of any size.

    How many objects there are depends on values, which `torch.export` cannot follow through a detector's heads; torch's older
    exporter, by tracing, can.

    Args:
        detector: folded, in evaluation mode.
        example: an image.
        about: for the metadata.
        opset: None: 18.

    Raises:
        ValueError: torch cannot express the detector in that opset, or the file would be above 2 GiB.
    """
    import onnx

    names = ("boxes", "labels", "scores", "masks")
    with torch.no_grad():
        outputs = tuple(name for name in names if name in of_one_image(detector, example))
    buffer: Any = io.BytesIO()
    try:
        with warnings.catch_warnings():
            # Of the exporter's age, and that traces hold constants: the file is checked.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                DetectorGraph(detector, outputs).eval(),
                (example,),
                buffer,
                input_names=["image"],
                output_names=list(outputs),
                dynamic_axes={"image": {1: "height", 2: "width"}},
                opset_version=opset or _OPSET,
                dynamo=False,
            )
    except Exception as error:  # many kinds, of several libraries
        raise ValueError(
            f"torch cannot write {about.model} as ONNX ({first_line(error)}): try another --opset, or --format torch"
        ) from error
    return finished_onnx(onnx.load_from_string(buffer.getvalue()), about)


def detection_difference(expected: Objects, found: Objects, settings: DetectorSettings) -> float | None:
    """How far what is found is from what is expected; None if there is nothing to compare.

    The objects' order is free, as scores that are equal up to rounding change places. Each object is compared with the
    nearest one of its label, either way: the largest difference between scores, between boxes relative to the largest
    coordinate, and the mean one between masks. Left out are objects whose score is so near to the threshold, or in a full
    list to its last one's, that rounding decides whether they are told.

    >>> one = {"boxes": torch.rand(2, 4), "scores": torch.tensor([0.9, 0.7]), "labels": torch.tensor([1, 2])}
    >>> other = {name: value.flip(0) for name, value in one.items()}
    >>> detection_difference(one, other, DetectorSettings())
    0.0
    """
    limits = [settings.score_threshold]
    for objects in (expected, found):
        if len(objects["scores"]) >= settings.detections_per_image:
            limits.append(float(objects["scores"].min()))
    sure = [objects["scores"] > max(limits) + _ROUNDING for objects in (expected, found)]
    if not bool(sure[0].any()) and not bool(sure[1].any()):
        return None
    distances = _distances(expected, found)
    if not distances.numel():
        return float("inf")
    return max(
        float(nearest[chosen].max()) if bool(chosen.any()) else 0.0
        for nearest, chosen in ((distances.amin(1), sure[0]), (distances.amin(0), sure[1]))
    )


def _distances(expected: Objects, found: Objects) -> Tensor:
    """Of each expected object to each found one."""
    largest = expected["boxes"].abs().max().clamp_min(1) if len(expected["boxes"]) else torch.tensor(1.0)
    boxes = (expected["boxes"][:, None] - found["boxes"][None]).abs().amax(2) / largest
    scores = (expected["scores"][:, None] - found["scores"][None]).abs()
    distances = torch.maximum(boxes, scores)
    if "masks" in expected:
        rows = [(mask - found["masks"]).abs().flatten(1).mean(1) for mask in expected["masks"]]
        if rows:
            distances = torch.maximum(distances, torch.stack(rows))
    other = expected["labels"][:, None] != found["labels"][None]
    return distances.masked_fill(other, float("inf"))
