"""The loss, the metric and the pictures of segmentation."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as reference_matrix
from sklearn.metrics import jaccard_score
from torch import nn

import batchless as bl
from batchless.data import IMAGENET_STATISTICS
from batchless.data.label_maps import IGNORED
from batchless.data.map_loading import MapAugment, MapBatch
from batchless.data.scattered_maps import scattered_maps
from batchless.models.segmenters import build_segmenter
from batchless.tasks.segment import Confusion, Segment, SegmentationData
from batchless.tasks.segment.confusion import confusion_matrix, intersection_over_union, mean_over_union
from batchless.tasks.segment.pictures import coloured, shares, told_shares, write_label_maps

CLASSES = 4


class Fixed(nn.Module):
    """Gives the scores it is built with, whatever it sees."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, images):
        return self.scores[: len(images)]


def task(count=4) -> Segment:
    images = scattered_maps("test", count=count)
    data = SegmentationData(
        train_images=images, test_images=images, augment=MapAugment(), statistics=IMAGENET_STATISTICS, seed=0
    )
    return Segment(data=data)


def labels_from(values) -> torch.Tensor:
    return torch.tensor([IGNORED if value == CLASSES else value for value in values], dtype=torch.uint8)


pixels = st.lists(st.tuples(st.integers(0, CLASSES), st.integers(0, CLASSES - 1)), min_size=1, max_size=60)


@given(pairs=pixels)
def test_the_matrix_and_iou_are_scikit_learns(pairs):
    truth, predicted = labels_from(t for t, _ in pairs), torch.tensor([p for _, p in pairs])
    matrix = confusion_matrix(truth, predicted, CLASSES)
    valid = truth != IGNORED
    if not valid.any():
        assert not matrix.any()
        assert mean_over_union(matrix) == 0
        return
    known, guess = truth[valid].numpy(), predicted[valid].numpy()
    assert matrix.tolist() == reference_matrix(known, guess, labels=range(CLASSES)).tolist()
    present = sorted({*known.tolist(), *guess.tolist()})
    expected = jaccard_score(known, guess, labels=present, average=None, zero_division=0)
    iou = intersection_over_union(matrix)
    assert iou[present].tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert all(math.isnan(value) for value in iou[[label for label in range(CLASSES) if label not in present]])
    assert mean_over_union(matrix) == pytest.approx(sum(expected) / len(present), abs=1e-12)


@given(seed=st.integers(0, 99), cut=st.integers(0, 5))
def test_the_metric_over_parts_is_that_over_all(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, CLASSES, 6, 8, generator=generator)
    labels = torch.randint(0, CLASSES + 1, (5, 6, 8), generator=generator).to(torch.uint8)
    labels[labels == CLASSES] = IGNORED

    def metric(rows):
        found = Confusion(classes=CLASSES)
        for row in rows:
            batch = MapBatch(images=torch.zeros(1, 3, 6, 8), labels=labels[row][None], indices=torch.tensor([row]))
            found.update(Fixed(scores[row][None]), batch)
        return found

    whole, first = metric(range(5)), metric(range(cut))
    first.merge(metric(range(cut, 5)))
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert [mapped.index for mapped in first.mapped] == list(range(5))
    valid = labels != IGNORED
    flat = scores.movedim(1, -1)[valid]
    expected = nn.functional.cross_entropy(flat.double(), labels[valid].long())
    figures = whole.compute()
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["pixel_accuracy"] == pytest.approx(float((flat.argmax(1) == labels[valid]).float().mean()))
    assert sum(whole.pixels()) == int(valid.sum())
    assert torch.equal(whole.mapped[3].prediction(), scores[3].argmax(0).to(torch.uint8))


def test_scores_of_another_size_are_resized_to_the_maps():
    scores = torch.zeros(1, 2, 2, 2)
    scores[0, 1, :, 1] = 4.0
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[..., 4:] = 1
    metric = Confusion(classes=2)
    metric.update(
        Fixed(scores - 2 * torch.tensor([0.0, 1.0])[None, :, None, None]), MapBatch(scores, labels, torch.tensor([0]))
    )
    assert metric.compute()["miou"] == 1.0
    assert Confusion(classes=2).compute() == {"miou": 0.0, "pixel_accuracy": 0.0, "loss": 0.0}


def ragged_batch() -> MapBatch:
    """Three crops: one with few valid pixels, one with none, one with all."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (3, 16, 16), generator=generator).to(torch.uint8)
    labels[0, 3:] = IGNORED
    labels[1] = IGNORED
    return MapBatch(
        images=torch.randn(3, 3, 16, 16, generator=generator).double(), labels=labels, indices=torch.arange(3)
    )


def part_of(batch, rows) -> MapBatch:
    return MapBatch(*(tensor[rows] for tensor in batch))


def gradients(parts, normalizer="gn+ws"):
    torch.manual_seed(0)
    model, _ = bl.convert(
        build_segmenter("cifar_resnet8_lraspp", num_classes=6), normalizer, example=torch.zeros(2, 3, 16, 16)
    )
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    segment = task()
    with bl.accumulate(model, optimizer) as step:
        for part in parts:
            loss, count = segment.loss(model, part)
            step.backward(loss / count.clamp_min(1), samples=count, images=segment.images(part))
    return [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


@pytest.mark.filterwarnings("ignore:.*values per group")
def test_accumulated_crops_of_ragged_counts_equal_the_full_batch():
    batch = ragged_batch()
    whole = gradients([batch])
    for pieces in ([[0], [1], [2]], [[0, 1], [2]], [[1], [0, 2]], [[1], [1], [0, 1, 2]]):
        parts = gradients([part_of(batch, rows) for rows in pieces])
        assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-12) for one, other in zip(whole, parts, strict=True))


def test_a_crop_that_is_all_ignored_counts_nothing():
    batch = part_of(ragged_batch(), [1])
    model = build_segmenter("cifar_resnet8_lraspp", num_classes=6).double()
    loss, count = task().loss(model, batch)
    assert (float(loss.detach()), int(count)) == (0.0, 0)
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    metric = Confusion(classes=6)
    with torch.no_grad():
        metric.update(model.eval(), batch)
    assert metric.compute() == {"miou": 0.0, "pixel_accuracy": 0.0, "loss": 0.0}


def test_pictures_show_the_image_the_truth_and_the_prediction(tmp_path):
    from PIL import Image

    segment = task(20)
    metric = segment.metric()
    truth = torch.stack([segment.data.test_images.sample(index)[1] for index in range(20)])
    for batch in segment.data.test(range(20)):
        index = int(batch.indices)
        scores = nn.functional.one_hot(truth[index].long() * (index > 4), 6).movedim(-1, 0)[None].float()
        metric.update(Fixed(scores), batch)
    segment.picture(metric, tmp_path)
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert [record["kind"] for record in records] == ["worst"] * 8 + ["typical"] * 8
    assert records[0]["measure"] == "mIoU"
    assert records[0]["predicted"] == "background 100 %"
    assert records[-1]["confidence"] == 1
    assert records[-1]["truth"] == records[-1]["predicted"]
    with Image.open(tmp_path / records[0]["picture"]) as picture:
        assert picture.size == (3 * 96 + 8, 96)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write pictures into"):
        write_label_maps(tmp_path / "file", metric.mapped, segment.data.test_images)


def test_colours_and_shares():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    labels = torch.tensor([[0, 1], [1, IGNORED]], dtype=torch.uint8)
    shown = coloured(image, labels, ("background", "cat"))
    assert shown[:, 0, 0].tolist() == [0, 0, 0]
    assert shown[:, 0, 3].tolist() == [77, 0, 0]
    assert shown[:, 3, 3].tolist() == [153, 153, 153]
    assert shares(labels, ("background", "cat", "dog")) == (("cat", 2 / 3), ("background", 1 / 3))
    assert told_shares(()) == "nothing"
