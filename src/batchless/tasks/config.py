"""What makes a training run what it is."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from batchless.data import Augment, Mix
from batchless.data.clip_sampling import FrameSampling
from batchless.data.object_loading import ObjectAugment
from batchless.models.detectors import DetectorSettings
from batchless.nn import parse_normalizer
from batchless.surgery import require_lean_level
from batchless.tasks.segment.settings import SegmentSettings
from batchless.train.device import require_device_name
from batchless.train.settings import LoopSettings, OptimizerSettings, Precision

TaskName = Literal["classify", "detect", "segment", "video"]

_OF_ONE_TASK: Mapping[str, tuple[TaskName, ...]] = {
    "label_smoothing": ("classify", "segment", "video"),
    "detector": ("detect",),
    "segment": ("segment",),
    "video": ("video",),
    "data.shorter_sides": ("detect",),
    **{
        f"data.{name}": ("classify", "video")
        for name in (
            "image_size",
            "resize_shorter_side",
            "crop_padding",
            "random_resized_crop",
            "rand_augment",
            "rand_augment_magnitude",
            "color_jitter",
            "erasing",
        )
    },
    "data.mixup": ("classify",),
    "data.cutmix": ("classify",),
}
"""Settings that only some tasks have: for another one, a value of theirs would change nothing."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images, and what happens to them.

    Attributes:
        root: folder of a dataset in any known layout; None: the embedded handwriting.
        image_size: the square that the network sees, in pixels.
        resize_shorter_side: of a test image, before its central square is taken; None: image_size.
        crop_padding: random crops after padding by so many pixels.
        random_resized_crop: random parts resized (ImageNet's way) instead.
        flip: mirror images at random; not for digits.
        rand_augment: so many operations of RandAugment on each training image; 0: none.
        rand_augment_magnitude: how strong they are, 0 to 30.
        color_jitter: how far brightness, contrast and saturation change; 0: not.
        erasing: share of the training images of which a rectangle is filled.
        mixup: alpha of mixup; 0: none. Partners come from the whole dataset, so one image per forward can be mixed.
        cutmix: alpha of CutMix; 0: none.
        shorter_sides: of detection: the lengths, in pixels, one of which a training image's shorter side gets at random; none:
            detector.shorter_side.
        train_images: use only so many training images, chosen by the seed; None: all.
        test_images: use only so many test images, always the same; None: all.
        workers: processes that prepare batches; 0: the training process itself.
    """

    root: str | None = None
    image_size: int = 32
    resize_shorter_side: int | None = None
    crop_padding: int = 2
    random_resized_crop: bool = False
    flip: bool = False
    rand_augment: int = 0
    rand_augment_magnitude: int = 9
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    shorter_sides: tuple[int, ...] = ()
    train_images: int | None = None
    test_images: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("image_size", 1),
            ("resize_shorter_side", self.image_size),
            ("crop_padding", 0),
            ("train_images", 1),
            ("test_images", 1),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be {least} or more, got {value}")
        try:
            self.augment()
            self.mix()
        except ValueError as error:
            raise ValueError(f"data.{error}") from error

    def augment(self) -> Augment:
        """What happens at random to a training image."""
        return Augment(
            crop_padding=self.crop_padding,
            random_resized_crop=self.random_resized_crop,
            flip=self.flip,
            rand_augment=self.rand_augment,
            rand_augment_magnitude=self.rand_augment_magnitude,
            color_jitter=self.color_jitter,
            erasing=self.erasing,
        )

    def object_augment(self, detector: DetectorSettings) -> ObjectAugment:
        """What happens at random to a training image of a detector."""
        sides = self.shorter_sides or (detector.shorter_side,)
        return ObjectAugment(shorter_sides=sides, longest_side=detector.longest_side, flip=self.flip)

    def mix(self) -> Mix | None:
        """How training images are blended in pairs, if they are."""
        mix = Mix(mixup=self.mixup, cutmix=self.cutmix)
        return mix if self.mixup or self.cutmix else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that makes a training run what it is; `config.yaml` in its folder.

    Attributes:
        task: classify: single images; detect: objects, by boxes and masks; segment: a class for every pixel; video: clips,
            which then are what is counted as images.
        model: of classify: `timm:<name>`, `torchvision:<name>` or `cifar_resnet<depth>`; of detect:
            `<architecture>_<backbone>_fpn`, such as maskrcnn_resnet50_fpn; of segment: `torchvision:<segmenter>`,
            `smp:<Architecture>-<encoder>` or `cifar_resnet<depth>_lraspp`; of video: `tsm:<a network of classify>` or
            `torchvision:<video network>`.
        normalizer: such as bn, gn+ws, bcn-micro+ws.
        images: training images seen in all.
        images_per_forward: the micro-batch.
        images_per_step: what one optimizer step sees.
        evaluations: how often the test images are evaluated.
        seed: of weights, order and augmentation.
        out: the run folder; None: runs/<model>-<normalizer>-<images_per_forward>-seed<seed>.
        weights: checkpoint of the unconverted network to start from, of a detector or segmenter its backbone's; None: random
            weights.
        device: cpu or cuda.
        threads: of torch on the CPU; None: torch's default.
        precision: float32, or forward passes under autocast to bf16 or fp16.
        lean: what is computed again in the backward pass to save memory: 0 nothing, 1 normalizations and activations, 2 also
            cheap convolutions, 3 whole blocks; see `batchless.lean`.
        average: memory, in images, of a moving average of the weights, which is then evaluated and kept; None: none.
        label_smoothing: share of each label that is spread over all classes.
        checkpoint_seconds: how often a checkpoint is written besides before each evaluation.
        tensorboard: whether the metrics are written as TensorBoard events too.
        data: which images or clips.
        detector: of detect: the network's sizes.
        segment: of segment: sizes, augmentation, the meaning of label maps.
        video: of video: which frames of a clip.
        optimizer: the optimizer and its schedule.
    """

    task: TaskName = "classify"
    model: str = "cifar_resnet8"
    normalizer: str = "bcn-micro+ws"
    images: int = 6000
    images_per_forward: int = 1
    images_per_step: int = 32
    evaluations: int = 4
    seed: int = 0
    out: str | None = None
    weights: str | None = None
    device: str = "cpu"
    threads: int | None = None
    precision: Precision = "float32"
    lean: int = 0
    average: float | None = None
    label_smoothing: float = 0.0
    checkpoint_seconds: float = 60.0
    tensorboard: bool = True
    data: DataSettings = field(default_factory=DataSettings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    segment: SegmentSettings = field(default_factory=SegmentSettings)
    video: FrameSampling = field(default_factory=FrameSampling)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        parse_normalizer(self.normalizer)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        self.loop_settings(device=self.device)
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, or null for torch's default; got {self.threads}")
        require_device_name(self.device)
        require_lean_level(self.lean)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        self._refuse_settings_of_other_tasks()
        try:
            self.data.object_augment(self.detector)
        except ValueError as error:
            raise ValueError(f"data.{error}") from error

    def _refuse_settings_of_other_tasks(self) -> None:
        for key, tasks in _OF_ONE_TASK.items():
            holder, name = (self.data, key.removeprefix("data.")) if key.startswith("data.") else (self, key)
            default = next(item for item in fields(holder) if item.name == name)
            plain = default.default if default.default_factory is MISSING else default.default_factory()
            if self.task not in tasks and getattr(holder, name) != plain:
                raise ValueError(
                    f"{key} is a setting of task={tasks[0]} and does nothing in task={self.task}: leave it out"
                )

    def loop_settings(self, *, device: str) -> LoopSettings:
        """What of it the training loop needs, on the device of this process."""
        return LoopSettings(
            images=self.images,
            images_per_forward=self.images_per_forward,
            images_per_step=self.images_per_step,
            evaluations=self.evaluations,
            optimizer=self.optimizer,
            device=device,
            seed=self.seed,
            precision=self.precision,
            average=self.average,
            checkpoint_seconds=self.checkpoint_seconds,
        )

    def folder(self) -> Path:
        """Where the run is written."""
        if self.out is not None:
            return Path(self.out)
        model = self.model.replace(":", "-")
        return Path("runs") / f"{model}-{parse_normalizer(self.normalizer)}-{self.images_per_forward}-seed{self.seed}"

    def plain(self) -> dict[str, Any]:
        """As `config.yaml` holds it: the normalizer's name in its canonical form."""
        return asdict(self) | {"normalizer": str(parse_normalizer(self.normalizer))}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], *, source: str | Path) -> "TrainConfig":
        """The configuration that `plain()` was of; settings that came later have their defaults.

        ValueError naming `source` if a setting is unknown or wrong.
        """
        groups: dict[str, Any] = {
            "data": DataSettings,
            "detector": DetectorSettings,
            "segment": SegmentSettings,
            "video": FrameSampling,
            "optimizer": OptimizerSettings,
        }
        try:
            values = {
                name: made_from(groups[name], value) if name in groups else value for name, value in dict(plain).items()
            }
            made: TrainConfig = made_from(cls, values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} holds no configuration of a training: {error}") from error
        return made


def made_from(kind: Any, values: Mapping[str, Any]) -> Any:
    """The settings dataclass `kind` from plain values; ValueError for one that it does not know."""
    known = {item.name for item in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown setting {unknown[0]!r}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
