"""The one training loop."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor, nn

from batchless.nn.standardized import standardized
from batchless.runs import RunFolder
from batchless.train.accumulate import accumulate, batched
from batchless.train.settings import LoopSettings
from batchless.train.task import Batch, Data, Task

_LOG_EVERY_SECONDS = 0.5
"""How often the loss is read from the device: reading waits for it."""

OnProgress = Callable[[int, Mapping[str, float]], None]
"""`on_progress(images, figures)`: called while training with the images seen so far and the latest figures."""


def ignore_progress(images: int, figures: Mapping[str, float]) -> None:
    """Show nothing."""


def train(
    model: nn.Module,
    task: Task[Batch],
    data: Data[Batch],
    settings: LoopSettings,
    run: RunFolder,
    on_progress: OnProgress = ignore_progress,
) -> dict[str, float]:
    """Train `model` in place on `settings.images` images; metrics and the last checkpoint go to the run folder.

    `metrics.jsonl` gets `{"kind": "train", "images": ..., "loss": ...}` about twice a second (the loss of the step just
    done, before it) and `{"kind": "test", "images": ..., <name>: <value>, ...}` at every evaluation; `images` are those seen
    so far. `checkpoints/last.pt` (`model`, `optimizer`, `images`) is written before every evaluation.

    Args:
        model: with the normalizer it is to be trained with.
        task: what is learned.
        data: the batches.
        settings: how long and in which pieces.
        run: where metrics and checkpoints go; `summary.json` is written at the end.
        on_progress: shows the progress.

    Returns:
        The summary: the last test figures as `test_<name>`, `images`, `seconds`, `images_per_second` of training.

    Raises:
        ValueError: the loss or a weight became NaN or infinite; the checkpoint is one from before.
    """
    loop = _Loop(model.to(settings.device), task, data, settings, run, on_progress)
    test = loop.run_all()
    summary = {f"test_{name}": value for name, value in test.items()}
    summary |= {"images": loop.images, "seconds": loop.seconds, "images_per_second": loop.images / loop.seconds}
    run.finish(summary)
    return summary


@torch.no_grad()
def evaluate(model: nn.Module, task: Task[Batch], data: Data[Batch], device: str = "cpu") -> Mapping[str, float]:
    """The task's metric over the test images, with every weight standardized once."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    metric = task.metric()
    try:
        with standardized(model):
            for batch in data.test():
                metric.update(model, task.to(batch, device))
    finally:
        for module in training:
            module.training = True
    return metric.compute()


@dataclass
class _Loop(Generic[Batch]):
    model: nn.Module
    task: Task[Batch]
    data: Data[Batch]
    settings: LoopSettings
    run: RunFolder
    on_progress: OnProgress
    images: int = 0
    seconds: float = 0.0

    def run_all(self) -> Mapping[str, float]:
        settings = self.settings
        self.optimizer = settings.optimizer.build(self.model)
        self.clip = settings.optimizer.clip()
        self.figures: dict[str, float] = {}
        self.finite = torch.ones((), dtype=torch.bool, device=settings.device)
        evaluate_at = [settings.images * (i + 1) // settings.evaluations for i in range(settings.evaluations)]
        test: Mapping[str, float] = {}
        self.model.train()
        self.logged = started = time.perf_counter()
        for step in self._steps():
            self._step(step)
            if self.images >= evaluate_at[0]:
                self._require_finite()  # waits for the device, so before the clock is read
                self.seconds += time.perf_counter() - started
                self._save()
                test = self._evaluate()
                evaluate_at = [at for at in evaluate_at if at > self.images]
                started = time.perf_counter()
        return test

    def _steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step.

        No step crosses epochs: with a ragged micro-batch in its middle it would see other images, and there would be
        another number of steps, for each `images_per_forward`.
        """
        settings = self.settings
        left, epoch = settings.images, 0
        while left > 0:
            images = min(left, self.data.images_per_epoch)
            micro_batches = self.data.train(epoch, images_per_forward=settings.images_per_forward, images=images)
            yield from batched(micro_batches, settings.images_per_step // settings.images_per_forward)
            left, epoch = left - images, epoch + 1

    def _step(self, micro_batches: list[Batch]) -> None:
        # The middle of the step: at its beginning a warm-up would make the first step of learning rate 0.
        progress = (self.images + sum(self.task.images(batch) for batch in micro_batches) / 2) / self.settings.images
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.optimizer.learning_rate_at(progress)
        total: Tensor | float = 0.0
        with accumulate(self.model, self.optimizer, clip=self.clip) as step:
            for micro_batch in micro_batches:
                batch = self.task.to(micro_batch, self.settings.device)
                loss, count = self.task.loss(self.model, batch)
                images = self.task.images(batch)
                mean = loss / (max(count, 1) if isinstance(count, int) else count.clamp_min(1))
                step.backward(mean, samples=count, images=images)
                self.finite &= mean.detach().isfinite()
                total = total + mean.detach() * images
                self.images += images
        if time.perf_counter() - self.logged > _LOG_EVERY_SECONDS:
            self._log(float(total) / sum(self.task.images(batch) for batch in micro_batches))

    def _log(self, loss: float) -> None:
        self._require_finite()
        self.logged = time.perf_counter()
        self.figures["loss"] = loss
        self.run.log({"kind": "train", "images": self.images, "loss": loss})
        self.on_progress(self.images, self.figures)

    def _save(self) -> None:
        # A finite loss may have had a gradient that was not, which would show only in the next loss.
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"{name} became NaN or infinite within {self.images} images: {self._fix()}")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "images": self.images}
        self.run.save_checkpoint("last", state)

    def _evaluate(self) -> Mapping[str, float]:
        test = evaluate(self.model, self.task, self.data, self.settings.device)
        self.run.log({"kind": "test", "images": self.images, **test})
        self.figures.update({f"test_{name}": value for name, value in test.items()})
        self.on_progress(self.images, self.figures)
        return test

    def _require_finite(self) -> None:
        if not bool(self.finite):
            raise ValueError(f"the loss became NaN or infinite within {self.images} images: {self._fix()}")

    def _fix(self) -> str:
        optimizer = self.settings.optimizer
        return (
            f"lower optimizer.learning_rate (now {optimizer.learning_rate:g}), lengthen optimizer.warmup "
            f"(now {optimizer.warmup:g}), or clip (optimizer.adaptive_clipping=0.1)"
        )
