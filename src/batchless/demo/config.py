"""What `batchless demo` compares: one network with several normalizers, and a federation with several algorithms."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from batchless.federated import FederateConfig, FederatedDataSettings
from batchless.federated.client import CLIENT_OPTIMIZER
from batchless.models.detectors import DetectorSettings
from batchless.tasks import DataSettings, TrainConfig
from batchless.train.settings import OptimizerSettings

_COMMON = {"seed": "seeds", "out": "out", "threads": "processes"}
_NOT_OF_TRAIN = {"normalizer": "normalizers", "images_per_forward": "images_per_forward", **_COMMON}
_NOT_OF_FEDERATE = {"algorithm": "algorithms", "workers": "processes", **_COMMON}
"""Settings of a run that are not `train`'s or `federate`'s here, and where they come from."""

DETECTION = TrainConfig(
    task="detect",
    model="fcos_resnet18_fpn",
    images=2400,
    images_per_step=2,
    evaluations=3,
    data=DataSettings(test_images=100),
    detector=DetectorSettings(shorter_side=96, longest_side=96, stages=2, channels=32),
    optimizer=OptimizerSettings(name="adamw", learning_rate=0.001, weight_decay=1e-4, clip_norm=10.0),
)
"""What `batchless demo --task detect` trains, but for what is set otherwise."""

VIDEO = TrainConfig(
    task="video", model="tsm:cifar_resnet8", images=3200, data=DataSettings(image_size=16, crop_padding=0)
)
"""What `batchless demo --task video` trains, but for what is set otherwise: TSM on the embedded clips."""

FEDERATION = FederateConfig(
    rounds=10,
    images_per_step=8,
    evaluate_every=2,
    workers=1,
    data=FederatedDataSettings(images_per_client=743, image_size=16),
    optimizer=replace(CLIENT_OPTIMIZER, learning_rate=0.1, adaptive_clipping=0.1),  # without it FedWon may diverge
)
"""What the algorithms of `batchless demo` have in common: five embedded domains of digits, one client of 743 images in each."""

SEGMENTATION = TrainConfig(
    task="segment",
    model="cifar_resnet8_lraspp",
    images=4800,
    images_per_step=8,
    evaluations=2,
    data=DataSettings(test_images=100),
    optimizer=OptimizerSettings(learning_rate=0.3, clip_norm=10.0),
)
"""What `batchless demo --task segment` trains, but for what is set otherwise."""

_OF_A_TASK: Mapping[str, TrainConfig] = {"detect": DETECTION, "segment": SEGMENTATION, "video": VIDEO}
_SIZES: Mapping[str, tuple[int, ...]] = {"detect": (1, 2), "segment": (1, 2, 8)}
"""Images per forward of tasks whose steps are of fewer images."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `batchless demo` compares.

    Attributes:
        out: folder of the runs and of `report.html`; must not exist.
        normalizers: the rows.
        images_per_forward: the columns; if nothing else is said, for detection 1 and 2, for segmentation 1, 2 and 8.
        seeds: how often each run is repeated, with seeds 0, 1, ...
        train: what all runs have in common. With `train.task` (also `--task`) detect, segment or video, settings left at their
            defaults are the demo's of that task.
        federated: whether federated algorithms are compared too; None: with classification of the embedded images.
        algorithms: of that comparison.
        federate: what its runs have in common.
        processes: runs at a time, each with one thread; None: one per core.
    """

    out: str = "runs/demo"
    normalizers: tuple[str, ...] = ("bn", "gn", "gn+ws", "bcn-micro+ws")
    images_per_forward: tuple[int, ...] = (1, 2, 32)
    seeds: int = 1
    train: TrainConfig = field(default_factory=TrainConfig)
    federated: bool | None = None
    algorithms: tuple[str, ...] = ("fedavg", "fedbn", "fedwon")
    federate: FederateConfig = FEDERATION
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("normalizers", "images_per_forward", "algorithms"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, got {list(values)}")
        for name, value in (("seeds", self.seeds), ("processes", self.processes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        sizes = DemoConfig.images_per_forward
        if self.images_per_forward == sizes:
            object.__setattr__(self, "images_per_forward", _SIZES.get(self.train.task, sizes))
        if (other := _OF_A_TASK.get(self.train.task)) is not None:
            object.__setattr__(self, "train", _filled(self.train, TrainConfig(), other))
        _require_common("train", self.train, TrainConfig(), _NOT_OF_TRAIN)
        _require_common("federate", self.federate, FEDERATION, _NOT_OF_FEDERATE)
        if self.federate.engine != "processes":
            raise ValueError(f"federate.engine must be processes in a demo, got {self.federate.engine}")
        self.runs()
        self.federated_runs()

    def runs(self) -> list[TrainConfig]:
        """One configuration for each run in one place, those that take longest first."""
        folder = Path(self.out)
        return [
            replace(
                self.train,
                normalizer=normalizer,
                images_per_forward=size,
                seed=seed,
                threads=1,
                out=str(folder / f"{normalizer}-{size}-seed{seed}"),
            )
            for size in sorted(self.images_per_forward)
            for seed in range(self.seeds)
            for normalizer in self.normalizers
        ]

    def federated_runs(self) -> list[FederateConfig]:
        """One configuration for each federated run; none where that is not asked for."""
        embedded = self.train.task == "classify" and self.train.data.root is None
        if not (embedded if self.federated is None else self.federated):
            return []
        folder = Path(self.out)
        return [
            replace(
                self.federate,
                algorithm=algorithm,
                seed=seed,
                threads=1,
                workers=1,
                out=str(folder / f"{algorithm}-seed{seed}"),
            )
            for algorithm in self.algorithms
            for seed in range(self.seeds)
        ]


def _require_common(what: str, given: Any, default: Any, others: Mapping[str, str]) -> None:
    """ValueError for a setting that is not one for all runs."""
    for name, source in others.items():
        if getattr(given, name) != getattr(default, name):
            raise ValueError(f"{what}.{name} is not one for all runs here: set {source} instead")


def _filled(given: Any, defaults: Any, other: Any) -> Any:
    """`given` with each setting that is at its default replaced by that of `other`, groups of settings one by one."""
    values = {}
    for item in fields(given):
        value, default, instead = (getattr(settings, item.name) for settings in (given, defaults, other))
        if is_dataclass(value):
            values[item.name] = _filled(value, default, instead)
        else:
            values[item.name] = instead if value == default else value
    return type(given)(**values)
