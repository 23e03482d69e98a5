import gc
from random import Random

import pytest
import torch

from batchless.data import Augment, ChannelStatistics, epoch_order
from batchless.data.augment import augmented, centred
from batchless.data.clip_loading import clip_batches
from batchless.data.clip_sampling import FrameSampling
from batchless.data.clips import ClipFiles, open_clips
from batchless.data.statistics import normalized
from small_clips import numbered, write_clips, write_video

PLAIN = ChannelStatistics(mean=(0, 0, 0), std=(1, 1, 1))
DEFAULTS = {
    "seed": 1,
    "epoch": 2,
    "image_size": 12,
    "augment": None,
    "mean_std": PLAIN,
    "sampling": FrameSampling(frames=4),
}
EVERYTHING = Augment(rand_augment=2, color_jitter=0.4, erasing=1.0, random_resized_crop=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return open_clips(write_clips(tmp_path_factory.mktemp("clips"), train=7, test=2), "train")


def load(clips, micro_batches=None, **settings):
    micro_batches = [[0, 1, 2], [3, 4], [5, 6]] if micro_batches is None else micro_batches
    return list(clip_batches(clips, micro_batches, **DEFAULTS | settings))


def joined(found):
    return torch.cat([batch.clips for batch in found])


def test_a_batch_has_looks_frames_and_labels(clips):
    first, *_ = load(clips, sampling=FrameSampling(frames=4, views=3))
    assert (first.clips.shape, first.clips.dtype) == ((3, 3, 4, 3, 12, 12), torch.float32)
    assert first.labels.tolist() == [0, 0, 0]
    assert not first.short.any()
    assert not first.damaged.any()


@pytest.mark.parametrize("augment", [None, Augment(), EVERYTHING], ids=["none", "crop", "everything"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_batch_size_and_position_change_nothing(clips, augment):
    whole = joined(load(clips, augment=augment))
    assert torch.equal(whole, joined(load(clips, augment=augment, workers=2)))
    assert torch.equal(whole, joined(load(clips, [[index] for index in range(7)], augment=augment)))
    assert torch.equal(whole[4:], joined(load(clips, [[4], [5, 6]], augment=augment)))
    assert torch.equal(whole.flip(0), joined(load(clips, [list(range(6, -1, -1))], augment=augment)))
    gc.collect()


def test_the_epoch_and_the_seed_change_frames_and_view(clips):
    sampling = FrameSampling(frames=2)
    found = [
        joined(load(clips, augment=Augment(), sampling=sampling, **other)) for other in ({}, {"epoch": 3}, {"seed": 4})
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("augment", [Augment(), EVERYTHING], ids=["crop", "everything"])
def test_all_frames_of_a_clip_are_augmented_alike(tmp_path, augment):
    """Of a clip whose frames are equal, all views are."""
    picture = torch.randint(0, 255, (24, 32, 3), dtype=torch.uint8).numpy()
    path = write_video(tmp_path / "a.avi", [picture] * 8, codec="rawvideo")
    clips = ClipFiles(files=((str(path), 0),), classes=("a",))
    (batch,) = load(clips, [[0]], augment=augment)
    frames = batch.clips[0, 0]
    assert all(torch.equal(frame, frames[0]) for frame in frames)


def test_it_is_the_augmentation_of_images_frame_by_frame():
    frames = torch.randint(0, 255, (3, 3, 20, 26), dtype=torch.uint8)
    for augment in (Augment(), Augment(random_resized_crop=True, color_jitter=0.3)):
        together = augmented(frames, 12, augment=augment, rng=Random(5))
        alone = torch.stack([augmented(frame, 12, augment=augment, rng=Random(5)) for frame in frames])
        assert torch.equal(together, alone)
    assert torch.equal(centred(frames, 12), torch.stack([centred(frame, 12) for frame in frames]))


def test_evaluation_takes_the_middle_frames(clips):
    (batch,) = load(clips, [[0]], image_size=16)
    expected = clips.clip(0, lambda length: (1, 3, 5, 7)).images
    assert torch.equal(batch.clips[0, 0], normalized(expected, PLAIN))


def test_short_and_damaged_clips_are_told(tmp_path):
    short = write_video(tmp_path / "short.mp4", numbered(2, width=16, height=16))
    noise = torch.randint(0, 255, (20, 16, 16, 3), dtype=torch.uint8).numpy()
    damaged = write_video(tmp_path / "damaged.avi", list(noise))
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size * 3 // 4])
    clips = ClipFiles(files=((str(short), 0), (str(damaged), 0)), classes=("a",))
    (batch,) = load(clips, [[0, 1]])
    assert batch.short.tolist() == [True, False]
    assert batch.damaged.tolist() == [False, True]
    assert torch.equal(batch.clips[0, 0, 0], batch.clips[0, 0, 1])
    for workers in (0, 1):
        damaged.write_bytes(b"")
        with pytest.raises(ValueError, match=r"damaged\.avi: cannot be read as a video"):
            load(clips, [[0, 1]], workers=workers)
    gc.collect()


def test_arguments_out_of_range_are_said_at_once(clips):
    for settings, message in (
        ({"image_size": 0}, "image_size=0"),
        ({"workers": -1}, "workers=-1"),
        ({"resize_to": 8}, "resize_to=8"),
        ({"micro_batches": [[0], []]}, "micro-batch 1 of 2 is empty"),
        ({"micro_batches": [[7]]}, "out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            load(clips, **settings)
    with pytest.raises(ValueError, match="label 1 is out of range"):
        load(ClipFiles(files=((clips.source(0), 1),), classes=("a",)), [[0]])


def test_the_global_random_state_is_left_alone(clips):
    before = torch.get_rng_state()
    load(clips, augment=EVERYTHING)
    assert torch.equal(torch.get_rng_state(), before)
    assert epoch_order(3, seed=0, epoch=0)
