"""The settings of the training loop; everything that goes on over time is stated in images."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from batchless.train.clipping import AGC, Clip, ClipNorm

Precision = Literal["float32", "bf16", "fp16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer and its schedule.

    The learning rate is a function of the share of the training's images that have been seen, so it does not depend on how
    many images a forward or a step sees; with `reference_images_per_step` it also follows the size of the step.

    Attributes:
        name: `sgd` or `adamw`.
        learning_rate: at the top of the schedule.
        reference_images_per_step: the step's size that `learning_rate` is meant for; a step of k times as many images has
            k times that rate. None: the rate is as given.
        momentum: of sgd.
        nesterov: whether sgd's momentum is Nesterov's.
        weight_decay: of weights.
        decay_one_dimensional: whether one-dimensional parameters (biases, gains) have weight decay too.
        warmup: share of the training over which the learning rate rises from 0.
        schedule: after the warm-up: `cosine` to 0; `poly`, `(1 - share)^power`; `step`, times `decay` at each milestone;
            `constant`.
        milestones: of `step`: shares of the whole training, rising.
        decay: of `step`.
        power: of `poly`.
        adaptive_clipping: lambda of adaptive gradient clipping; None: off.
        clip_norm: largest norm of all gradients together; None: off.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    reference_images_per_step: int | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_one_dimensional: bool = False
    warmup: float = 0.1
    schedule: Literal["cosine", "step", "poly", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    power: float = 0.9
    adaptive_clipping: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate must be above 0, got {self.learning_rate}")
        _require(
            self.reference_images_per_step is None or self.reference_images_per_step >= 1,
            f"optimizer.reference_images_per_step must be 1 or more, or null; got {self.reference_images_per_step}",
        )
        _require(0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must be 0 or more, got {self.weight_decay}")
        _require(0 <= self.warmup < 1, f"optimizer.warmup is a share of the training in [0, 1), got {self.warmup}")
        _require(
            list(self.milestones) == sorted(set(self.milestones)) and all(0 < at < 1 for at in self.milestones),
            f"optimizer.milestones are rising shares of the training, such as [0.5, 0.75]; got {list(self.milestones)}",
        )
        _require(0 < self.decay <= 1, f"optimizer.decay must be in (0, 1], got {self.decay}")
        _require(self.power > 0, f"optimizer.power must be above 0, got {self.power}")
        _require(
            self.adaptive_clipping is None or self.clip_norm is None,
            "optimizer.adaptive_clipping and optimizer.clip_norm are alternatives: set one of them",
        )
        for name in ("adaptive_clipping", "clip_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"optimizer.{name} must be above 0, or null for none; got {value}")

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over the parameters of `model` that require a gradient.

        torch's fused form: one pass over the memory in place of one for each operation, and one call for all parameters.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": parameters, "weight_decay": self.weight_decay}]
        if self.weight_decay and not self.decay_one_dimensional:
            groups = [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ]
        if self.name == "sgd":
            nesterov = self.nesterov and self.momentum > 0
            return torch.optim.SGD(groups, self.learning_rate, self.momentum, nesterov=nesterov, fused=True)
        return torch.optim.AdamW(groups, self.learning_rate, fused=True)

    def clip(self) -> Clip | None:
        """The gradient clipping, if any."""
        if self.adaptive_clipping is not None:
            return AGC(self.adaptive_clipping)
        return None if self.clip_norm is None else ClipNorm(self.clip_norm)

    def learning_rate_at(self, progress: float, *, images_per_step: int) -> float:
        """The learning rate after the share `progress` of the training.

        >>> rates = OptimizerSettings(reference_images_per_step=128)
        >>> [round(rates.learning_rate_at(progress, images_per_step=128), 3) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
        >>> round(rates.learning_rate_at(0.1, images_per_step=64), 3)
        0.05
        """
        top = self.learning_rate
        if self.reference_images_per_step is not None:
            top *= images_per_step / self.reference_images_per_step
        if progress < self.warmup:
            return top * progress / self.warmup
        share = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        match self.schedule:
            case "cosine":
                return top * 0.5 * (1 + math.cos(math.pi * share))
            case "poly":
                return top * float((1 - share) ** self.power)
            case "step":
                return top * float(self.decay ** sum(progress >= at for at in self.milestones))
            case "constant":
                return top


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and in which pieces.

    Attributes:
        images: how many training images are seen in all.
        images_per_forward: the micro-batch.
        images_per_step: what one optimizer step sees, over all processes; a multiple of `images_per_forward`. The last step
            of an epoch sees what is left of it.
        evaluations: how often the test images are evaluated, evenly spread, the last time at the end.
        optimizer: the optimizer and its schedule.
        device: where the model lives, `cpu` or `cuda`.
        seed: of what the model itself draws, such as dropout.
        precision: `bf16` and `fp16` run forward passes under autocast, fp16 with a scaled loss.
        average: memory, in images, of an exponential moving average of the parameters, which is then what is evaluated and
            kept; None: none.
        checkpoint_seconds: how often `last.pt` is written besides before each evaluation.
    """

    images: int
    images_per_forward: int
    images_per_step: int
    evaluations: int
    optimizer: OptimizerSettings
    device: str = "cpu"
    seed: int = 0
    precision: Precision = "float32"
    average: float | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("images", "images_per_forward", "images_per_step", "evaluations"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more, got {getattr(self, name)}")
        _require(
            self.images_per_step % self.images_per_forward == 0,
            f"images_per_step={self.images_per_step} must be a multiple of images_per_forward={self.images_per_forward}",
        )
        _require(
            self.precision in ("float32", "bf16", "fp16"),
            f"precision must be float32, bf16 or fp16, got {self.precision!r}",
        )
        _require(
            self.average is None or self.average >= 1,
            f"average is a memory in images, 1 or more, or null for none; got {self.average}",
        )
        _require(self.checkpoint_seconds >= 0, f"checkpoint_seconds must be 0 or more, got {self.checkpoint_seconds}")
