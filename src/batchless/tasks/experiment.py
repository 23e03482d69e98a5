"""From a resolved configuration to a trained model in a run folder."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from batchless.data import Augment, ImageDataset, channel_statistics, first_images, open_images
from batchless.models import build_model
from batchless.nn import parse_normalizer
from batchless.runs import RunFolder, load_checkpoint, load_model_state
from batchless.surgery import ConversionReport, convert
from batchless.tasks.classify import Classify, ImageData
from batchless.train.loop import OnProgress, ignore_progress, train
from batchless.train.settings import LoopSettings, OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images.

    Attributes:
        root: folder of a dataset in any known layout; None: the embedded handwriting.
        image_size: the square that the network sees, in pixels.
        crop_padding: random crops after padding by so many pixels.
        random_resized_crop: random parts resized (ImageNet's way) instead.
        flip: mirror images at random; not for digits.
        train_images: use only so many training images, chosen by the seed; None: all.
        test_images: use only so many test images, always the same; None: all.
        workers: processes that prepare batches; 0: the training process itself.
    """

    root: str | None = None
    image_size: int = 32
    crop_padding: int = 2
    random_resized_crop: bool = False
    flip: bool = False
    train_images: int | None = None
    test_images: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("image_size", 1),
            ("crop_padding", 0),
            ("train_images", 1),
            ("test_images", 1),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be {least} or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that makes a training run what it is; `config.yaml` in its folder.

    Attributes:
        model: `timm:<name>`, `torchvision:<name>` or `cifar_resnet<depth>`.
        normalizer: such as bn, gn+ws, bcn-micro+ws.
        images: training images seen in all.
        images_per_forward: the micro-batch.
        images_per_step: what one optimizer step sees.
        evaluations: how often the test images are evaluated.
        seed: of weights, order and augmentation.
        out: the run folder; None: runs/<model>-<normalizer>-<images_per_forward>-seed<seed>.
        weights: checkpoint of the unconverted network to start from; None: random weights.
        device: cpu or cuda.
        threads: of torch on the CPU; None: torch's default.
        data: which images.
        optimizer: the optimizer and its schedule.
    """

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
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        parse_normalizer(self.normalizer)
        self.loop_settings()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, or null for torch's default; got {self.threads}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be cpu, cuda, or cuda:<number>, got {self.device!r}")

    def loop_settings(self) -> LoopSettings:
        """What of it the training loop needs."""
        return LoopSettings(
            images=self.images,
            images_per_forward=self.images_per_forward,
            images_per_step=self.images_per_step,
            evaluations=self.evaluations,
            optimizer=self.optimizer,
            device=self.device,
        )

    def folder(self) -> Path:
        """Where the run is written."""
        if self.out is not None:
            return Path(self.out)
        model = self.model.replace(":", "-")
        return Path("runs") / f"{model}-{parse_normalizer(self.normalizer)}-{self.images_per_forward}-seed{self.seed}"


@dataclass(frozen=True)
class Trained:
    """The result of a run."""

    folder: Path
    summary: Mapping[str, float]
    conversion: ConversionReport


def run_training(config: TrainConfig, on_progress: OnProgress = ignore_progress) -> Trained:
    """Train as `config` says; the run folder gets `failed` as its summary if that is not possible.

    Raises:
        ValueError: a wrong setting (nothing is written), or a failure while training (the folder says so).
    """
    normalizer = parse_normalizer(config.normalizer)
    _check_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = _open_data(config)
    torch.manual_seed(config.seed)
    model = build_model(config.model, num_classes=len(data.train_images.classes))
    if config.weights is not None:
        checkpoint = load_checkpoint(config.weights)
        state = checkpoint.get("model")
        load_model_state(model, state if isinstance(state, Mapping) else checkpoint, source=config.weights)
    example = torch.zeros(2, 3, config.data.image_size, config.data.image_size)
    _check_runs(model, example, config)
    model, report = convert(model, normalizer, example=example)
    if not report.replaced and str(normalizer) != "bn":
        raise ValueError(
            f"{config.model} has nothing that {normalizer} replaces: choose a network with batch normalization, or bn"
        )
    run = RunFolder.create(config.folder(), config=asdict(config) | {"normalizer": str(normalizer)}, seed=config.seed)
    try:
        (run.path / "conversion.txt").write_text(f"{report}\n", encoding="utf-8")
        summary = train(model, Classify(), data, config.loop_settings(), run, on_progress)
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        run.finish({"failed": " ".join(reason.split())})
        raise
    return Trained(folder=run.path, summary=summary, conversion=report)


def _check_device(device: str) -> None:
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and index >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device={device}, but this machine has {found or 'no'} CUDA devices: use device=cpu")


@torch.no_grad()
def _check_runs(model: nn.Module, example: Tensor, config: TrainConfig) -> None:
    model.eval()
    try:
        model(example)
    except Exception as error:  # a network that was built for other images can raise anything
        size = config.data.image_size
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{config.model} does not run on {size}x{size} images ({reason}): choose another data.image_size or model"
        ) from error
    model.train()


def _open_data(config: TrainConfig) -> ImageData:
    settings = config.data
    train_images, test_images = open_images(settings.root, "train"), open_images(settings.root, "test")
    statistics = channel_statistics(train_images, limit=500)
    train_images = _limited(train_images, settings.train_images, seed=config.seed, name="train_images")
    test_images = _limited(test_images, settings.test_images, seed=0, name="test_images")
    augment = Augment(
        crop_padding=settings.crop_padding, random_resized_crop=settings.random_resized_crop, flip=settings.flip
    )
    return ImageData(
        train_images=train_images,
        test_images=test_images,
        image_size=settings.image_size,
        augment=augment,
        statistics=statistics,
        seed=config.seed,
        workers=settings.workers,
    )


def _limited(images: ImageDataset, count: int | None, *, seed: int, name: str) -> ImageDataset:
    if count is None:
        return images
    try:
        return first_images(images, count, seed=seed)
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from error
