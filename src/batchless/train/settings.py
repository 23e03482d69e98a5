"""The settings of the training loop; everything that goes on over time is stated in images."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from batchless.train.clipping import AGC, Clip, ClipNorm


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer and its schedule.

    Attributes:
        name: `sgd` (with Nesterov momentum) or `adamw`.
        learning_rate: at the top of the schedule.
        momentum: of sgd.
        weight_decay: of weights; one-dimensional parameters (biases, gains) have none.
        warmup: share of the training over which the learning rate rises from 0.
        schedule: `cosine` to 0 after the warm-up, or `constant`.
        adaptive_clipping: lambda of adaptive gradient clipping; None: off.
        clip_norm: largest norm of all gradients together; None: off.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    adaptive_clipping: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate must be above 0, got {self.learning_rate}")
        _require(0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must be 0 or more, got {self.weight_decay}")
        _require(0 <= self.warmup < 1, f"optimizer.warmup is a share of the training in [0, 1), got {self.warmup}")
        _require(
            self.adaptive_clipping is None or self.clip_norm is None,
            "optimizer.adaptive_clipping and optimizer.clip_norm are alternatives: set one of them",
        )
        for name in ("adaptive_clipping", "clip_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"optimizer.{name} must be above 0, or null for none; got {value}")

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over the parameters of `model` that require a gradient."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.name == "sgd":
            return torch.optim.SGD(groups, self.learning_rate, self.momentum, nesterov=self.momentum > 0)
        return torch.optim.AdamW(groups, self.learning_rate)

    def clip(self) -> Clip | None:
        """The gradient clipping, if any."""
        if self.adaptive_clipping is not None:
            return AGC(self.adaptive_clipping)
        return None if self.clip_norm is None else ClipNorm(self.clip_norm)

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate after the share `progress` of the training.

        >>> [round(OptimizerSettings().learning_rate_at(progress), 3) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
        """
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        share = (progress - self.warmup) / (1 - self.warmup)
        return self.learning_rate * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(share, 1.0)))))


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and in which pieces.

    Attributes:
        images: how many training images are seen in all.
        images_per_forward: the micro-batch.
        images_per_step: what one optimizer step sees; a multiple of `images_per_forward`. The last step of an epoch sees
            what is left of it.
        evaluations: how often the test images are evaluated, evenly spread, the last time at the end.
        optimizer: the optimizer and its schedule.
        device: where the model lives, `cpu` or `cuda`.
    """

    images: int
    images_per_forward: int
    images_per_step: int
    evaluations: int
    optimizer: OptimizerSettings
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("images", "images_per_forward", "images_per_step", "evaluations"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more, got {getattr(self, name)}")
        _require(
            self.images_per_step % self.images_per_forward == 0,
            f"images_per_step={self.images_per_step} must be a multiple of images_per_forward={self.images_per_forward}",
        )
