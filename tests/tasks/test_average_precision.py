import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchless.data.object_loading import object_batches
from batchless.data.objects import AnnotatedImage, boxes_of, packed_masks
from batchless.data.scattered_digits import scattered_digits
from batchless.tasks.detect.average_precision import (
    AveragePrecision,
    Detections,
    ImageResult,
    average_precision,
    coco_records,
    detections,
)
from batchless.tasks.detect.matching import best_threshold, matched

CLASSES = 4


def random_masks(random, count, side):
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    for mask in masks:
        top, left = random.integers(0, side - 8, 2)
        height, width = random.integers(4, side, 2)
        mask[top : top + height, left : left + width] = 1
    return masks


def random_result(random, index, *, side):
    """An image with objects of all sizes, crowds among them, and detections: shifted objects and inventions."""
    count = int(random.integers(0, 6))
    masks = random_masks(random, count, side)
    known = AnnotatedImage(
        source=str(index),
        read=lambda: torch.zeros(3, side, side, dtype=torch.uint8),
        height=side,
        width=side,
        boxes=boxes_of(masks) if count else torch.zeros(0, 4),
        labels=torch.as_tensor(random.integers(0, CLASSES, count)),
        crowd=torch.as_tensor(random.random(count) < 0.2),
        areas=masks.flatten(1).sum(1).float(),
        segmentations=packed_masks(masks),
    )
    shift = [int(value) for value in random.integers(-3, 4, 2)]
    found = torch.cat([masks.roll(shift, (1, 2)), random_masks(random, int(random.integers(0, 5)), side)])
    wrong = torch.as_tensor(random.random(len(found)) < 0.2)
    labels = torch.cat([known.labels, torch.as_tensor(random.integers(0, CLASSES, len(found) - count))])
    detected = Detections(
        boxes=boxes_of(found) + torch.rand(len(found), 4) if len(found) else torch.zeros(0, 4),
        labels=torch.where(wrong, 0, labels),
        scores=torch.as_tensor(random.random(len(found)), dtype=torch.float32),
        masks=packed_masks(found),
    )
    return ImageResult(index=index, known=known, found=detected)


def reference(results, kind):
    """pycocotools' twelve figures, of which the first six are AP."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = coco_records(results, CLASSES, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {**truth, "info": {}}
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(found), "bbox" if kind == "box" else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_pycocotools_average_precision(kind, seed):
    random = np.random.default_rng(seed)
    results = [random_result(random, index, side=int(random.choice([24, 60, 130]))) for index in range(12)]
    evaluation = reference(results, kind)
    precision = average_precision(results, CLASSES, kind)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    expected = {name: value for name, value in zip(names, evaluation.stats, strict=False) if value >= 0}
    assert precision.figures("") == pytest.approx(expected, abs=1e-6)
    assert 0.05 < expected["ap"] < 0.95
    for label in range(CLASSES):
        values = evaluation.eval["precision"][:, :, label, 0, -1]
        known = values[values > -1]
        assert precision.of_class(label) == pytest.approx(known.mean() if len(known) else None, abs=1e-6)


class Finds(nn.Module):
    """Gives for each image what was put down for it."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, images):
        return [next(self.outputs) for _ in images]


def perfect(digits):
    for image in digits.images:
        masks = image.masks()[:, None].float()
        yield {"boxes": image.boxes, "labels": image.labels + 1, "scores": torch.ones(len(image)), "masks": masks}


def test_finding_everything_is_an_ap_of_one_and_parts_merge():
    digits = scattered_digits("test", count=12)
    outputs = list(perfect(digits))
    metrics = []
    for part in (range(5), range(5, 12)):
        metric = AveragePrecision(classes=5, masks=True)
        batches = object_batches(digits, [[index] for index in part], seed=0, epoch=0, augment=None, masks=True)
        for batch, index in zip(batches, part, strict=True):
            metric.update(Finds([outputs[index]]), batch)
        metrics.append(metric)
    metrics[0].merge(metrics[1])
    assert [result.index for result in metrics[0].results] == list(range(12))
    figures = metrics[0].compute()
    assert {"ap", "ap50", "ap75", "ap_small", "mask_ap", "mask_ap50"} <= figures.keys()
    assert set(figures.values()) == {1.0}
    assert "ap_large" not in figures


def test_the_background_is_no_class():
    output = {"boxes": torch.rand(3, 4), "labels": torch.tensor([0, 1, 3]), "scores": torch.rand(3)}
    found = detections(output, masks=False)
    assert found.labels.tolist() == [0, 2]
    assert torch.equal(found.boxes, output["boxes"][1:])
    assert found.masks is None


def test_nothing_found_is_an_ap_of_zero():
    digits = scattered_digits("test", count=4)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    metric = AveragePrecision(classes=5, masks=False)
    for batch in object_batches(digits, [[0, 1], [2, 3]], seed=0, epoch=0, augment=None, masks=False):
        metric.update(Finds([nothing] * 2), batch)
    assert metric.compute()["ap"] == 0
    assert AveragePrecision(classes=5, masks=False).compute() == {"ap": 0.0}


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_hits_are_dealt_out_once_and_the_threshold_is_the_best(seed):
    random = np.random.default_rng(seed)
    matches = [matched(random_result(random, index, side=40)) for index in range(6)]
    for match in matches:
        assert int(match.hit.sum()) <= match.objects
        assert 0 <= match.f1(0.5) <= 1

    def overall(threshold):
        hits = sum(int(match.hit[match.scores >= threshold].sum()) for match in matches)
        shown = sum(int((match.scores >= threshold).sum()) for match in matches)
        return 2 * hits / max(shown + sum(match.objects for match in matches), 1)

    scores = torch.cat([match.scores for match in matches]).tolist()
    assert overall(best_threshold(matches)) == pytest.approx(max(map(overall, scores), default=0))


def test_a_detection_in_a_crowd_is_neither_right_nor_wrong():
    random = np.random.default_rng(0)
    result = random_result(random, 0, side=40)
    known = replace(result.known.only(torch.zeros(len(result.known), dtype=torch.bool)), segmentations=())
    crowd = replace(
        known,
        boxes=torch.tensor([[0.0, 0, 40, 40]]),
        labels=torch.tensor([1]),
        crowd=torch.tensor([True]),
        areas=torch.tensor([1600.0]),
        segmentations=None,
    )
    found = Detections(
        boxes=torch.tensor([[1.0, 1, 9, 9], [1.0, 1, 9, 9]]),
        labels=torch.tensor([1, 2]),
        scores=torch.tensor([0.9, 0.8]),
        masks=None,
    )
    match = matched(ImageResult(index=0, known=crowd, found=found))
    assert match.scores.tolist() == pytest.approx([0.8])
    assert match.objects == 0
    assert match.f1(0.5) == 0
    assert match.f1(0.85) == 1
