"""The exact micro-batch step inside Hugging Face's Trainer, by its overridable `training_step`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchless.train.accumulate import accumulate
from batchless.train.clipping import Clip, ClipNorm

Inputs = Mapping[str, Any]
"""One micro-batch of the Trainer: the model's keyword arguments."""

_WAITING = "_batchless_micro_batches"
"""Attribute of a trainer: the micro-batches of the optimizer step in the making."""


def images_in(inputs: Inputs) -> int:
    """How many images a micro-batch holds: the length of its first tensor."""
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor))


def accumulated_training_step(
    trainer: Any,
    model: nn.Module,
    inputs: Inputs,
    *,
    clip: Clip | None = None,
    samples: Callable[[Inputs], int | Tensor] = images_in,
) -> Tensor:
    """What a Trainer's `training_step` does, with the optimizer step by `batchless.accumulate`.

    `per_device_train_batch_size` is images per forward, times `gradient_accumulation_steps` images per optimizer step. The
    micro-batches of a step wait (the Trainer has them all in memory anyway) until its last one comes; then one block
    runs them all and steps. The Trainer's own step that follows finds no gradients and changes nothing; schedules, callbacks,
    evaluation, logs and checkpoints are the Trainer's, except that it logs a `grad_norm` of 0.

    Args:
        trainer: the Trainer, whose `compute_loss` must give the mean over the micro-batch's samples, as it does by default.
        model: as `training_step` got it.
        inputs: as `training_step` got them.
        clip: as of `batchless.accumulate`, with `max_grad_norm=0`; None: by `max_grad_norm`, as the Trainer clips.
        samples: how many samples the loss of a micro-batch averages over, where these are not its images: valid pixels.

    Returns:
        The mean loss of the optimizer step at its last micro-batch, else 0.

    Raises:
        ValueError: several processes or devices, fp16, or two ways of clipping; and what `batchless.accumulate` raises.
    """
    _check(trainer, clip)
    vars(trainer).setdefault(_WAITING, []).append(inputs)
    if not trainer.accelerator.sync_gradients:
        return torch.zeros((), device=trainer.args.device)
    # A step that was broken off (`should_epoch_stop`) left some that are not this one's.
    micro_batches = vars(trainer).pop(_WAITING)[-trainer.current_gradient_accumulation_steps :]
    if clip is None and trainer.args.max_grad_norm > 0:
        clip = ClipNorm(trainer.args.max_grad_norm)
    model.train()
    if callable(getattr(trainer.optimizer, "train", None)):
        trainer.optimizer.train()  # optimizers without a schedule have two modes
    total = torch.zeros((), device=trainer.args.device)
    count: int | Tensor = 0
    with accumulate(model, trainer.optimizer, clip=clip) as step:
        for micro_batch in micro_batches:
            n, images = samples(micro_batch), images_in(micro_batch)  # before compute_loss, which may take labels out
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, micro_batch)
            step.backward(loss, samples=n, images=images)
            total = total + loss.detach() * n
            count = count + n
    return total / count


def _check(trainer: Any, clip: Clip | None) -> None:
    processes = trainer.accelerator.distributed_type
    if processes != "NO" or trainer.args.n_gpu > 1:
        raise ValueError(
            f"the Trainer uses several devices or wraps the model ({processes.value}, n_gpu={trainer.args.n_gpu}), and "
            "accumulate reduces gradients itself: make one device visible (CUDA_VISIBLE_DEVICES=0), or use Accelerate"
        )
    if trainer.accelerator.scaler is not None:
        raise ValueError("fp16=True scales losses and unscales gradients in the Trainer's own step: use bf16=True")
    if clip is not None and trainer.args.max_grad_norm > 0:
        raise ValueError(
            f"two ways of clipping, clip={clip} and max_grad_norm={trainer.args.max_grad_norm}: set max_grad_norm=0"
        )
