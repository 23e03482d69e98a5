"""What a user of an exported network must know."""

from dataclasses import dataclass
from typing import Any

from batchless.data import ChannelStatistics
from batchless.models.detectors import learns_masks
from batchless.models.segmenters import size_multiple
from batchless.models.video import is_3d
from batchless.tasks import Trained


@dataclass(frozen=True, kw_only=True)
class About:
    """What a user of an exported network must know; every format holds it.

    An image has its shorter side resized to `resize_shorter_side` (None: it stays as it is; less where the longer side would
    exceed `longest_side`), of which the central square is taken where there is an `image_size`; it is scaled to [0, 1], and,
    unless `normalization_included`, normalized: `(image - mean) / std` per channel, red first. A clip's frames are chosen by
    `sampling`, as `batchless.data.clip_sampling.FrameSampling` has it, and are prepared alike.

    Attributes:
        task: of the run.
        model: name of the architecture.
        normalizer: what the network was trained with before it was folded.
        classes: names of the outputs, in order.
        input: its shape.
        output: its names and shapes.
        mean: of the channels.
        std: of the channels.
        image_size: side of the squares in pixels; None: images are no squares.
        resize_shorter_side: in pixels.
        longest_side: in pixels.
        sampling: of frames; None: the input is no clip.
        normalization_included: whether the network normalizes its input itself.
    """

    task: str
    model: str
    normalizer: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input: str
    output: str
    image_size: int | None
    resize_shorter_side: int | None
    longest_side: int | None
    sampling: dict[str, Any] | None
    normalization_included: bool

    @property
    def statistics(self) -> ChannelStatistics:
        """Mean and standard deviation by which images are normalized."""
        (r, g, b), (dr, dg, db) = self.mean, self.std
        return ChannelStatistics(mean=(r, g, b), std=(dr, dg, db))


def about(trained: Trained, *, normalization_included: bool) -> About:
    """What a user of the network must know."""
    config, plain = trained.config, trained.config.plain()
    input_shape, output = _shapes(trained)
    squares = config.task in ("classify", "video")
    sides: dict[str, int | None] = {"segment": config.segment.shorter_side, "detect": config.detector.shorter_side}
    return About(
        task=config.task,
        model=config.model,
        normalizer=plain["normalizer"],
        classes=trained.classes,
        mean=tuple(trained.statistics.mean),
        std=tuple(trained.statistics.std),
        input=input_shape,
        output=output,
        image_size=config.data.image_size if squares else None,
        resize_shorter_side=sides.get(config.task, config.data.resize_shorter_side or config.data.image_size),
        longest_side=config.detector.longest_side if config.task == "detect" else None,
        sampling=plain["video"] if config.task == "video" else None,
        normalization_included=normalization_included or config.task == "detect",  # detectors do it themselves
    )


def _shapes(trained: Trained) -> tuple[str, str]:
    """Of input and output, in words."""
    config, classes = trained.config, len(trained.classes)
    size = config.data.image_size
    match config.task:
        case "classify":
            return f"images [N, 3, {size}, {size}]", f"scores [N, {classes}]"
        case "video":
            frames = config.video.frames
            shape = f"3, {frames}" if is_3d(trained.model) else f"{frames}, 3"
            return f"clips [N, {shape}, {size}, {size}]", f"scores [N, {classes}]"
        case "segment":
            multiple = size_multiple(trained.model)
            sizes = (
                f", H and W multiples of {multiple} (zeros are added below and to the right)" if multiple > 1 else ""
            )
            return f"images [N, 3, H, W]{sizes}", f"scores [N, {classes}, H, W]"
        case "detect":
            masks = ", masks [D, 1, H, W] from 0 to 1" if learns_masks(config.model) else ""
            what = f"boxes [D, 4] (left, top, right, bottom in pixels), labels [D] (1 is the first class), scores [D]{masks}"
            return "one image [3, H, W]", what
