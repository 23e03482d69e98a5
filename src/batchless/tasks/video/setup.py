"""From the settings of a run to its clips."""

from batchless.data import channel_statistics
from batchless.data.clips import ClipDataset, MiddleFrames, first_clips, open_clips
from batchless.tasks.config import TrainConfig
from batchless.tasks.video.classify_clips import ClipData

_CLIPS_FOR_STATISTICS = 200


def open_clip_data(config: TrainConfig) -> ClipData:
    """The run's clips; ValueError if there are none, or not as many as are wanted."""
    settings = config.data
    train_clips, test_clips = open_clips(settings.root, "train"), open_clips(settings.root, "test")
    statistics = channel_statistics(MiddleFrames(clips=train_clips), limit=_CLIPS_FOR_STATISTICS)
    return ClipData(
        train_clips=limited_clips(train_clips, settings.train_images, seed=config.seed, name="train_images"),
        test_clips=limited_clips(test_clips, settings.test_images, seed=0, name="test_images"),
        image_size=settings.image_size,
        sampling=config.video,
        augment=settings.augment(),
        statistics=statistics,
        seed=config.seed,
        resize_to=settings.resize_shorter_side,
        workers=settings.workers,
    )


def limited_clips(clips: ClipDataset, count: int | None, *, seed: int, name: str) -> ClipDataset:
    """The first `count` clips of a seeded order in which every beginning has the classes in proportion; None: all."""
    if count is None:
        return clips
    try:
        return first_clips(clips, count, seed=seed)
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from error
