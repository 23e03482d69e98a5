import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchless.data import Augment, ChannelStatistics, Subset, epoch_order, open_images
from batchless.tasks import Classify
from batchless.tasks.classify import Accuracy, ImageData

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
    assert again.images == 0
    assert again.compute() == {}


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
    parts = list(image_data(handwriting).test())
    assert [len(labels) for _, labels in parts] == [64, 6]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    assert labels.tolist() == [handwriting[1].label(index) for index in range(70)]
    expected = torch.stack([handwriting[1].image(index) for index in range(70)]) / 255 * 2 - 1
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("images_per_forward", [1, 4, 32])
def test_training_images_come_in_the_order_of_their_epoch(handwriting, images_per_forward):
    data = image_data(handwriting)
    assert data.images_per_epoch == 10
    for epoch in range(2):
        parts = list(data.train(epoch, images_per_forward=images_per_forward, images=7))
        assert [len(labels) for _, labels in parts] == [
            min(images_per_forward, 7 - start) for start in range(0, 7, images_per_forward)
        ]
        order = epoch_order(10, seed=3, epoch=epoch)[:7]
        assert torch.cat([labels for _, labels in parts]).tolist() == [handwriting[0].label(index) for index in order]
        expected = torch.stack([handwriting[0].image(index) for index in order]) / 255 * 2 - 1
        torch.testing.assert_close(torch.cat([images for images, _ in parts]), expected)


def test_training_images_are_augmented_and_test_images_are_not(handwriting):
    plain, moved = (image_data(handwriting, augment=augment) for augment in (None, Augment(crop_padding=3)))

    def same(first, second):
        return all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))

    assert not same(*(data.train(0, images_per_forward=5, images=10) for data in (plain, moved)))
    assert same(*(moved.train(0, images_per_forward=5, images=10) for _ in range(2)))
    assert same(plain.test(), moved.test())


def test_images_are_resized_to_the_size_asked_for(handwriting):
    images, _ = next(image_data(handwriting, image_size=20).test())
    assert images.shape == (64, 3, 20, 20)
