import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from batchless.data import Augment, ChannelStatistics, Subset, epoch_order, open_images
from batchless.tasks import Classify
from batchless.tasks.accuracy import Accuracy
from batchless.tasks.classify import ImageData
from batchless.train import Processes, evaluate

HALF = ChannelStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Scores(nn.Module):
    """Takes scores for images, so that a test can say what a network finds."""

    def forward(self, x):
        return x


@pytest.fixture
def scores_and_labels():
    return torch.randn(23, 5), torch.randint(5, (23,))


@pytest.mark.parametrize("size", [1, 4, 23])
def test_batch_by_batch_is_all_at_once(scores_and_labels, size):
    scores, labels = scores_and_labels
    metric = Classify().metric()
    for batch in zip(scores.split(size), labels.split(size), strict=True):
        metric.update(Scores(), batch)
    found = metric.compute()
    assert found.keys() == {"accuracy", "loss"}
    assert found["accuracy"] == pytest.approx((scores.argmax(1) == labels).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)


def test_each_metric_starts_anew(scores_and_labels):
    task = Classify()
    task.metric().update(Scores(), scores_and_labels)
    again = task.metric()
    assert len(again.per_image().loss) == 0
    assert again.compute() == {"accuracy": 0.0, "loss": 0.0}


def test_an_empty_batch_adds_nothing(scores_and_labels):
    metrics = [Accuracy(), Accuracy()]
    metrics[0].update(Scores(), (torch.empty(0, 5), torch.empty(0, dtype=torch.long)))
    assert metrics[0].compute() == {"accuracy": 0.0, "loss": 0.0}
    for metric in metrics:
        metric.update(Scores(), scores_and_labels)
    assert metrics[0].compute() == metrics[1].compute()


def test_scores_of_half_precision_are_summed_in_single(scores_and_labels):
    scores, labels = scores_and_labels[0].bfloat16(), scores_and_labels[1]
    halves, singles = Accuracy(), Accuracy()
    halves.update(Scores(), (scores, labels))
    singles.update(Scores(), (scores.float(), labels))
    assert halves.compute() == singles.compute()


def test_the_loss_is_a_sum_over_images(scores_and_labels):
    scores, labels = scores_and_labels
    task = Classify()
    total, count = task.loss(Scores(), (scores, labels))
    assert count == task.images((scores, labels)) == 23
    torch.testing.assert_close(total / count, F.cross_entropy(scores, labels))


@pytest.fixture(scope="module")
def handwriting():
    train, test = open_images(None, "train"), open_images(None, "test")
    return Subset(dataset=train, indices=tuple(range(100, 110))), Subset(dataset=test, indices=tuple(range(70)))


def image_data(handwriting, **changes) -> ImageData:
    values = {"image_size": 32, "augment": None, "statistics": HALF, "seed": 3, **changes}
    return ImageData(train_images=handwriting[0], test_images=handwriting[1], **values)


def test_test_images_come_once_in_order_the_last_batch_ragged(handwriting):
    parts = list(image_data(handwriting).test(range(70)))
    assert [len(labels) for _, labels in parts] == [64, 6]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    assert labels.tolist() == [handwriting[1].label(index) for index in range(70)]
    expected = torch.stack([handwriting[1].image(index) for index in range(70)]) / 255 * 2 - 1
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("images_per_forward", [1, 4, 32])
def test_training_images_come_in_the_order_of_their_epoch(handwriting, images_per_forward):
    data = image_data(handwriting)
    for epoch in range(2):
        order = epoch_order(10, seed=3, epoch=epoch)
        assert data.order(epoch) == order
        plan = in_pieces(order[:7], images_per_forward)
        parts = list(data.train(epoch, plan))
        assert [len(labels) for _, labels in parts] == [len(piece) for piece in plan]
        labels = [handwriting[0].label(index) for index in order[:7]]
        assert torch.cat([labels for _, labels in parts]).tolist() == labels
        expected = torch.stack([handwriting[0].image(index) for index in order[:7]]) / 255 * 2 - 1
        torch.testing.assert_close(torch.cat([images for images, _ in parts]), expected)


def in_pieces(order, size):
    return [order[at : at + size] for at in range(0, len(order), size)]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_the_parts_of_several_processes_merge_into_the_whole(handwriting, processes):
    data, model = image_data(handwriting), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    whole = evaluate(model, Classify(), data)
    metrics = []
    for rank in range(processes):
        metric = Classify().metric()
        with torch.no_grad():
            for batch in data.test(Processes(rank, processes).part(70)):
                metric.update(model, batch)
        metrics.append(metric)
    for later in metrics[1:]:
        metrics[0].merge(later)
    torch.testing.assert_close(metrics[0].per_image().loss, whole.per_image().loss)
    assert torch.equal(metrics[0].per_image().predicted, whole.per_image().predicted)


def test_labels_that_are_probabilities_and_smoothing(scores_and_labels):
    scores, labels = scores_and_labels
    mixed = 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(labels.flip(0), 5)
    total, count = Classify().loss(Scores(), (scores, mixed))
    each = -(mixed * scores.log_softmax(1)).sum(1)
    assert count == 23
    torch.testing.assert_close(total, each.sum())
    smooth, _ = Classify(label_smoothing=0.2).loss(Scores(), (scores, labels))
    targets = 0.8 * F.one_hot(labels, 5) + 0.2 / 5
    torch.testing.assert_close(smooth, -(targets * scores.log_softmax(1)).sum())


def test_pictures_are_of_the_worst_and_of_typical_predictions(handwriting, tmp_path):
    data = image_data(handwriting)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    task = Classify(data=data)
    metric = evaluate(model, task, data)
    task.picture(metric, tmp_path / "pictures")
    records = json.loads((tmp_path / "pictures" / "predictions.json").read_text())
    assert [record["kind"] for record in records] == ["worst"] * 8 + ["typical"] * 8
    found = metric.per_image()
    order = found.loss.argsort(descending=True).tolist()
    sources = [data.test_images.source(index) for index in order]
    assert [record["source"] for record in records[:8]] == sources[:8]
    assert {record["source"] for record in records[8:]} == set(sources[31:39])
    for record, index in zip(records, order[:8], strict=False):
        assert record["truth"] == data.test_images.classes[data.test_images.label(index)]
        assert record["predicted"] == data.test_images.classes[int(found.predicted[index])]
        picture = np.asarray(Image.open(tmp_path / "pictures" / record["picture"]))
        assert np.array_equal(picture.transpose(2, 0, 1), data.test_images.image(index).numpy())


def test_training_images_are_augmented_and_test_images_are_not(handwriting):
    plain, moved = (image_data(handwriting, augment=augment) for augment in (None, Augment(crop_padding=3)))

    def same(first, second):
        return all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))

    plan = in_pieces(range(10), 5)
    assert not same(*(data.train(0, plan) for data in (plain, moved)))
    assert same(*(moved.train(0, plan) for _ in range(2)))
    assert same(plain.test(range(70)), moved.test(range(70)))


def test_images_are_resized_to_the_size_asked_for(handwriting):
    images, _ = next(image_data(handwriting, image_size=20).test(range(70)))
    assert images.shape == (64, 3, 20, 20)
