"""The one training loop."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any, Generic

import torch
from torch import Tensor, nn

from batchless.data.seeding import seed_torch
from batchless.runs import RunFolder
from batchless.runs.memory import forget_peak_memory, peak_memory_bytes
from batchless.train.accumulate import Accumulation
from batchless.train.autocast import autocast, loss_scaler
from batchless.train.average import ParameterAverage
from batchless.train.evaluate import evaluate
from batchless.train.interrupt import ShouldStop, TrainingStoppedError, never_stop
from batchless.train.processes import Processes
from batchless.train.settings import LoopSettings
from batchless.train.state import Progress, checkpoint_state, restore
from batchless.train.task import Batch, Data, Metric, Task
from batchless.train.waiting import Waiting

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
    run: RunFolder | None,
    on_progress: OnProgress = ignore_progress,
    *,
    about: Mapping[str, Any] | None = None,
    resume_from: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    should_stop: ShouldStop = never_stop,
) -> dict[str, float]:
    """Train `model` in place on `settings.images` images; metrics and checkpoints go to the run folder.

    `metrics.jsonl` gets `{"kind": "train", "images": ..., "loss": ...}` about twice a second (the loss of the step just
    done, before it) and `{"kind": "test", "images": ..., <name>: <value>, ...}` at every evaluation; `images` are those seen
    so far. `checkpoints/last.pt` is written before every evaluation and every `settings.checkpoint_seconds`,
    `checkpoints/best.pt` after an evaluation better than all before.

    What is trained is a function of the arguments, not of when checkpoints are written or where a run was interrupted: a
    resumed run ends with the same bits (on one machine type, with as many threads and processes).

    Args:
        model: with the normalizer it is to be trained with.
        task: what is learned.
        data: the batches.
        settings: how long and in which pieces.
        run: where metrics and checkpoints go; `summary.json` is written at the end. None: nowhere (processes but the first).
        on_progress: shows the progress.
        about: kept in every checkpoint, so that it can be used without the run folder.
        resume_from: a checkpoint of this run, to go on from.
        processes: this process among those that share each step's micro-batches.
        should_stop: asked after every step; the first process then saves, and this raises.

    Returns:
        The summary: the last test figures as `test_<name>`, `images`, `seconds`, `images_per_second` of training,
        `peak_memory_bytes` of this process (of the GPU, where one trains), and `waiting_share`: how much of the training time,
        since the start or the resumption, went by waiting for data.

    Raises:
        ValueError: the loss or a weight became NaN or infinite (the checkpoint is one from before), or `resume_from` is of
            another run.
        TrainingStoppedError: `should_stop()` became true; `last.pt` has everything that was done.
    """
    forget_peak_memory(settings.device)
    loop = _Loop(
        model=model.to(settings.device),
        task=task,
        data=data,
        settings=settings,
        run=run,
        on_progress=on_progress,
        about={} if about is None else about,
        processes=Processes() if processes is None else processes,
        should_stop=should_stop,
    )
    if resume_from is not None:
        loop.resume(resume_from)
    seconds_before = loop.progress.seconds
    metric = loop.run_all()
    progress = loop.progress
    seconds_now = progress.seconds - seconds_before
    summary = {f"test_{name}": value for name, value in metric.compute().items()}
    summary |= {
        "images": progress.images,
        "seconds": progress.seconds,
        "images_per_second": progress.images / progress.seconds,
        "peak_memory_bytes": peak_memory_bytes(settings.device),
        "waiting_share": loop.waiting.seconds / seconds_now if seconds_now > 0 else 0.0,
    }
    if run is not None:
        task.picture(metric, run.path / "pictures")
        run.finish(summary)
    return summary


@dataclass(kw_only=True)
class _Loop(Generic[Batch]):
    model: nn.Module
    task: Task[Batch]
    data: Data[Batch]
    settings: LoopSettings
    run: RunFolder | None
    on_progress: OnProgress
    about: Mapping[str, Any]
    processes: Processes
    should_stop: ShouldStop
    progress: Progress = field(default_factory=Progress)
    figures: dict[str, float] = field(default_factory=dict)
    waiting: Waiting[Batch] = field(default_factory=Waiting)

    def __post_init__(self) -> None:
        settings = self.settings
        self.processes.start_equal(self.model)
        self.optimizer = settings.optimizer.build(self.model)
        self.scaler = loss_scaler(settings.device, settings.precision)
        self.accumulation = Accumulation(self.model, self.optimizer, clip=settings.optimizer.clip(), scaler=self.scaler)
        self.average = None if settings.average is None else ParameterAverage(self.model, memory=settings.average)
        self.finite = torch.ones((), dtype=torch.bool, device=settings.device)

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        self.progress = restore(checkpoint, self.model, self.optimizer, self.scaler, self.average)
        if self.run is not None:
            self.run.forget_metrics_after(self.progress.metrics_bytes)

    def run_all(self) -> Metric[Batch]:
        settings, progress = self.settings, self.progress
        evaluate_at = [settings.images * (i + 1) // settings.evaluations for i in range(settings.evaluations)]
        metric: Metric[Batch] | None = None
        self.model.train()
        self._start_clock()
        for images, micro_batches in self._steps():
            if images:
                self._step(images, micro_batches)
                self._notice_the_time(images)
            due = [at for at in evaluate_at[progress.evaluations :] if at <= progress.images]
            if due and progress.images:  # not before the first step
                self._stop_clock()
                metric = self._evaluate(evaluations=len(due))
                self._start_clock()
        assert metric is not None, "the last evaluation is due after the last image"
        return metric

    def _steps(self) -> Iterator[tuple[int, Iterable[Batch]]]:
        """Each optimizer step's number of images and this process's micro-batches of it; first a step of no image.

        No step crosses epochs: with a ragged micro-batch in its middle it would see other images, and there would be
        another number of steps, for each `images_per_forward`.
        """
        settings = self.settings
        yield 0, ()  # a run that was interrupted in an evaluation goes on with it
        epoch, begin = 0, 0
        while begin < settings.images:
            order = self.data.order(epoch)
            end = min(begin + len(order), settings.images)
            if self.progress.images < end:
                yield from self._steps_of(order[self.progress.images - begin : end - begin], epoch)
            epoch, begin = epoch + 1, end

    def _steps_of(self, order: Sequence[int], epoch: int) -> Iterator[tuple[int, Iterable[Batch]]]:
        settings = self.settings
        steps = [order[at : at + settings.images_per_step] for at in range(0, len(order), settings.images_per_step)]
        mine = [
            self.processes.share(
                [step[at : at + settings.images_per_forward] for at in range(0, len(step), settings.images_per_forward)]
            )
            for step in steps
        ]
        batches = self.waiting.timed(self.data.train(epoch, [micro_batch for step in mine for micro_batch in step]))
        for step, micro_batches in zip(steps, mine, strict=True):
            yield len(step), islice(batches, len(micro_batches))

    def _step(self, images: int, micro_batches: Iterable[Batch]) -> None:
        settings, progress = self.settings, self.progress
        # The middle of the step: at its beginning a warm-up would make the first step of learning rate 0.
        share = (progress.images + images / 2) / settings.images
        for group in self.optimizer.param_groups:
            group["lr"] = settings.optimizer.learning_rate_at(share, images_per_step=settings.images_per_step)
        # What the model draws (dropout) is a function of the images seen, so that nothing else has to be saved.
        seed_torch(
            Random(f"step/{settings.seed}/{progress.images}/{self.processes.rank}").getrandbits(63), settings.device
        )
        total: Tensor | float = 0.0
        own_images = 0
        with self.accumulation.step() as step:
            for micro_batch in micro_batches:
                batch = self.task.to(micro_batch, settings.device)
                with autocast(settings.device, settings.precision):
                    loss, count = self.task.loss(self.model, batch)
                batch_images = self.task.images(batch)
                step.backward_sum(loss, samples=count, images=batch_images)
                mean = loss.detach() / (max(count, 1) if isinstance(count, int) else count.clamp_min(1))
                self.finite &= mean.isfinite()
                total = total + mean * batch_images
                own_images += batch_images
        self.processes.average_statistics(self.model)
        if self.average is not None:
            self.average.update(self.model, images=images)
        progress.images += images
        if time.perf_counter() - self.logged > _LOG_EVERY_SECONDS:
            self._log(float(total) / max(own_images, 1))

    def _notice_the_time(self, images: int) -> None:
        # Another process than the first goes on until the first one, which saves, is gone.
        stop = self.run is not None and self.should_stop()
        if stop or time.perf_counter() - self.saved >= self.settings.checkpoint_seconds:
            self._stop_clock()
            self._save()
            self._start_clock()
        if stop:
            raise TrainingStoppedError(self.progress.images)

    def _start_clock(self) -> None:
        self.started = self.logged = self.saved = time.perf_counter()

    def _stop_clock(self) -> None:
        self._require_finite()  # waits for the device, so before the clock is read
        self.progress.seconds += time.perf_counter() - self.started

    def _log(self, loss: float) -> None:
        self._require_finite()
        now = time.perf_counter()
        self.logged = now
        progress = self.progress
        self.figures["loss"] = loss
        self.figures["images/s"] = progress.images / (progress.seconds + now - self.started)
        if self.run is not None:
            self.run.log({"kind": "train", "images": progress.images, "loss": loss})
        self.on_progress(progress.images, self.figures)

    def _save(self) -> None:
        # A finite loss may have had a gradient that was not, which would show only in the next loss.
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"{name} became NaN or infinite within {self.progress.images} images: {self._fix()}")
        if self.run is not None:
            self.progress.metrics_bytes = self.run.metrics_bytes()
            state = checkpoint_state(self.model, self.optimizer, self.scaler, self.average, self.progress)
            self.run.save_checkpoint("last", {**self.about, **state})

    def _evaluate(self, *, evaluations: int) -> Metric[Batch]:
        self._save()
        settings, progress = self.settings, self.progress
        model = self.model if self.average is None else self.average.model
        try:
            metric = evaluate(
                model,
                self.task,
                self.data,
                settings.device,
                precision=settings.precision,
                processes=self.processes,
                should_stop=self.should_stop if self.run is not None else never_stop,
            )
        except TrainingStoppedError as stopped:
            raise TrainingStoppedError(progress.images) from stopped
        test = metric.compute()
        progress.evaluations += evaluations
        figure = test[self.task.main_figure]
        if self.run is not None:
            self.run.log({"kind": "test", "images": progress.images, **test})
            if progress.best is None or figure > progress.best:
                best = {"model": model.state_dict(), "images": progress.images, "figures": dict(test)}
                self.run.save_checkpoint("best", {**self.about, **best})
        progress.best = figure if progress.best is None else max(progress.best, figure)
        self.figures.update({f"test_{name}": value for name, value in test.items()})
        self.on_progress(progress.images, self.figures)
        return metric

    def _require_finite(self) -> None:
        if not bool(self.finite):
            raise ValueError(f"the loss became NaN or infinite within {self.progress.images} images: {self._fix()}")

    def _fix(self) -> str:
        optimizer = self.settings.optimizer
        return (
            f"lower optimizer.learning_rate (now {optimizer.learning_rate:g}), lengthen optimizer.warmup "
            f"(now {optimizer.warmup:g}), or clip (optimizer.adaptive_clipping=0.1)"
        )
