import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import batchless as bl
from batchless.data import Augment, ChannelStatistics, channel_statistics
from batchless.data.clip_loading import ClipBatch
from batchless.data.clip_sampling import FrameSampling
from batchless.data.clips import ClipSubset, MiddleFrames, open_clips
from batchless.models import build_video
from batchless.tasks import Classify
from batchless.tasks.classify import ImageData
from batchless.tasks.video import ClassifyClips, ClipData
from batchless.tasks.video.accuracy import ClipAccuracy, clip_scores
from batchless.tasks.video.pictures import Strips
from batchless.train import OptimizerSettings, Processes, evaluate
from batchless.train.loop import train
from batchless.train.settings import LoopSettings
from small_clips import write_clips

HALF = ChannelStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Scores(nn.Module):
    """The first pixels of a clip's first frame are its scores, so that a test can say what a network finds."""

    def forward(self, clips):
        return clips[:, 0, 0, 0, :7]


def batch_of(count=9, views=3):
    clips = torch.randn(count, views, 2, 3, 7, 7)
    flags = torch.arange(count) % 3
    return ClipBatch(clips=clips, labels=torch.randint(7, (count,)), short=flags == 1, damaged=flags == 2)


def part(batch, begin, end):
    return ClipBatch(*(tensor[begin:end] for tensor in batch))


def test_the_looks_at_a_clip_are_averaged_before_anything_else():
    batch = batch_of()
    scores = batch.clips[:, :, 0, 0, 0, :7].mean(1)
    torch.testing.assert_close(clip_scores(Scores(), batch), scores)
    found = evaluate_batch(batch)
    top = scores.topk(5, dim=1).indices
    assert found["accuracy"] == pytest.approx((scores.argmax(1) == batch.labels).float().mean().item())
    assert found["top5"] == pytest.approx((top == batch.labels[:, None]).any(1).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(scores, batch.labels).item(), rel=1e-5)
    correct = (scores.argmax(1) == batch.labels).float()
    by_class = [correct[batch.labels == label].mean().item() for label in batch.labels.unique()]
    assert found["class_accuracy"] == pytest.approx(sum(by_class) / len(by_class))
    assert (found["short_clips"], found["damaged_clips"]) == (3, 3)


def evaluate_batch(batch):
    metric = ClipAccuracy()
    metric.update(Scores(), batch)
    return metric.compute()


def test_parts_merge_to_the_whole():
    batch = batch_of()
    first, second, empty = ClipAccuracy(), ClipAccuracy(), ClipAccuracy()
    first.update(Scores(), part(batch, 0, 4))
    second.update(Scores(), part(batch, 4, 9))
    first.merge(second)
    first.merge(empty)
    assert first.compute() == pytest.approx(evaluate_batch(batch))
    assert empty.compute()["accuracy"] == 0


def test_the_loss_is_a_sum_over_clips():
    batch = batch_of(views=1)
    total, count = ClassifyClips().loss(Scores(), batch)
    assert count == ClassifyClips().images(batch) == 9
    torch.testing.assert_close(total / count, F.cross_entropy(batch.clips[:, 0, 0, 0, 0, :7], batch.labels))


def test_3d_networks_get_time_after_the_channels():
    network = build_video("torchvision:mc3_18", num_classes=7)
    batch = ClipBatch(*(torch.zeros(2, 1, 4, 3, 16, 16), torch.zeros(2, dtype=torch.long), *[torch.zeros(2) > 0] * 2))
    assert clip_scores(network, batch).shape == (2, 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_clips(tmp_path_factory.mktemp("clips"), train=24, test=12)
    train_clips, test_clips = open_clips(root, "train"), open_clips(root, "test")
    return ClipData(
        train_clips=train_clips,
        test_clips=test_clips,
        image_size=16,
        sampling=FrameSampling(frames=4),
        augment=Augment(crop_padding=1, flip=False),
        statistics=channel_statistics(MiddleFrames(clips=train_clips)),
        seed=0,
    )


def settings(**changes):
    values = {"images": 24, "images_per_forward": 1, "images_per_step": 4, "evaluations": 1}
    return LoopSettings(optimizer=OptimizerSettings(learning_rate=0.05), **values | changes)


def network(normalizer="gn+ws"):
    torch.manual_seed(0)
    model = build_video("tsm:cifar_resnet8", num_classes=2, frames=4)
    return bl.convert(model, normalizer, example=torch.zeros(2, 4, 3, 16, 16))[0]


def test_a_network_learns_which_way_a_bar_moves(data):
    model = network("bn+ws")
    found = train(model, ClassifyClips(), data, settings(images=192, images_per_forward=8, images_per_step=8), None)
    assert found["test_accuracy"] > 0.8
    assert found["images"] == 192


@pytest.mark.parametrize("normalizer", ["gn+ws", "in", "ln", "none+sws", "frozen-bn"])
def test_micro_batches_of_one_clip_are_the_whole_step(data, normalizer):
    models = [network(normalizer).double() for _ in range(2)]
    task = ClassifyClips()
    (whole,) = data.train(0, [[0, 1, 2, 3]])
    for model, batches in zip(models, ([whole], data.train(0, [[0], [1], [2], [3]])), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with bl.accumulate(model, optimizer) as step:
            for batch in batches:
                loss, count = task.loss(model, batch._replace(clips=batch.clips.double()))
                step.backward(loss / count, samples=count)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_evaluation_in_parts_is_that_of_the_whole(data):
    model = network()
    whole = evaluate(model, ClassifyClips(), data).compute()
    assert set(whole) == {"accuracy", "top5", "class_accuracy", "loss", "short_clips", "damaged_clips"}
    parts = [metric_of(model, data, Processes(rank=rank, count=2).part(12)) for rank in (0, 1)]
    parts[0].merge(parts[1])
    assert parts[0].compute() == pytest.approx(whole, rel=1e-4)


def metric_of(model, data, images):
    metric = ClipAccuracy()
    with torch.no_grad(), bl.standardized(model.eval()):
        for batch in data.test(images):
            metric.update(model, batch)
    return metric


def test_strips_of_frames_show_the_worst_and_the_typical(data, tmp_path):
    metric = metric_of(network(), data, range(12))
    ClassifyClips(data=data).picture(metric, tmp_path)
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert {record["kind"] for record in records} == {"worst", "typical"}
    loss = metric.per_image().loss
    worst = data.test_clips.source(int(loss.argmax()))
    assert records[0]["source"] == worst
    with Image.open(tmp_path / records[0]["picture"]) as picture:
        assert picture.size == (4 * 16, 16)


def test_long_clips_are_shown_by_eight_frames(data):
    strips = Strips(clips=data.test_clips, sampling=FrameSampling(frames=20, views=3), image_size=200)
    assert strips.image(0).shape == (3, 96, 8 * 96)
    assert (len(strips), strips.classes, strips.label(0)) == (12, ("left", "right"), 0)


@pytest.mark.slow
def test_the_embedded_clips_are_solved_by_shifts_and_not_by_frames():
    """One network each, 2400 clips: TSM, the same without shifts (a set of frames), and on the middle frame alone."""
    clips = {split: open_clips(None, split) for split in ("train", "test")}
    middles = {split: MiddleFrames(clips=clips[split]) for split in clips}
    statistics = channel_statistics(middles["train"], limit=100)
    common = {"image_size": 16, "augment": Augment(crop_padding=0, flip=False), "statistics": statistics, "seed": 0}
    moving = ClipData(
        train_clips=clips["train"],
        test_clips=ClipSubset(dataset=clips["test"], indices=tuple(range(240))),
        sampling=FrameSampling(frames=8),
        **common,
    )
    still = ImageData(train_images=middles["train"], test_images=middles["test"], **common)
    loop = settings(images=2400, images_per_forward=16, images_per_step=16)
    found = {}
    for kind in ("tsm", "tsn"):
        torch.manual_seed(0)
        model = build_video(f"{kind}:cifar_resnet8", num_classes=6, frames=8)
        found[kind] = train(bl.convert(model, "bn+ws")[0], ClassifyClips(), moving, loop, None)["test_accuracy"]
    torch.manual_seed(0)
    model = bl.models.build_model("cifar_resnet8", num_classes=6)
    found["frame"] = train(bl.convert(model, "bn+ws")[0], Classify(), still, loop, None)["test_accuracy"]
    assert found["tsm"] > 0.85
    assert found["tsn"] < 0.6, "opposite motions are the same set of frames: at most one half"
    assert found["frame"] < 0.25, "chance is one sixth"
