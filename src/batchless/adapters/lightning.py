"""The exact micro-batch step inside Lightning (`lightning` or `pytorch_lightning`), by its manual optimization."""

from contextlib import AbstractContextManager
from typing import Any

from batchless.train.accumulate import Step, accumulate
from batchless.train.clipping import Clip


def accumulated_step(module: Any, *, clip: Clip | None = None) -> AbstractContextManager[Step]:
    """`batchless.accumulate` for use in `training_step`: one optimizer step over the micro-batches of the block.

    The training dataloader is `batchless.batched(loader, k)`, so that a batch of Lightning's is a list of k micro-batches
    (the last one shorter). The optimizer is the module's own and is stepped through Lightning: `trainer.global_step`,
    `on_before_optimizer_step`, precision, checkpoints and loggers work as usual. Lightning itself refuses
    `accumulate_grad_batches` and `gradient_clip_val`, whose work is done here, with manual optimization.

    Args:
        module: the LightningModule, with `self.automatic_optimization = False`.
        clip: as of `batchless.accumulate`.

    Returns:
        A context manager that yields a `Step`: `step.backward(mean_loss, samples=n)` in place of `self.manual_backward`.

    Raises:
        ValueError: automatic optimization, several optimizers, a strategy that wraps the model or has several processes,
            or a precision with a loss scaler of Lightning's (`16-mixed`); and what `batchless.accumulate` raises.
    """
    trainer = module.trainer
    if module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} has automatic optimization, by which Lightning steps too: "
            "set self.automatic_optimization = False in its __init__"
        )
    if trainer.world_size > 1 or trainer.model is not module:
        raise ValueError(
            f"{type(trainer.strategy).__name__} with {trainer.world_size} processes wraps the model or reduces gradients, "
            "which accumulate does itself: use Trainer(devices=1), or Accelerate for several processes (docs/adapters.md)"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision={trainer.precision!r} scales losses and unscales gradients in Lightning's own step: "
            "use precision='bf16-mixed' or '32-true'"
        )
    optimizer = module.optimizers()
    if isinstance(optimizer, list):
        raise ValueError(
            f"configure_optimizers of {type(module).__name__} gives {len(optimizer)} optimizers, and a step has one: "
            "give one optimizer with several parameter groups"
        )
    return accumulate(module, optimizer, clip=clip)
