"""Privacy of images: DP-SGD on a client, per-image gradients by Opacus.

A step sees each image with probability q = B / n: `g = (sum_i min(1, C / ||g_i||) g_i + z) / B`, g_i the gradient of image i's
loss over all trainable parameters together, `z ~ N(0, (sigma C)^2)` for every element, B the expected number of images.
Whatever comes after (adaptive clipping, FedProx's pull, momentum) works on g, which tells no more than it does.

Source: Abadi et al., arXiv 1607.00133, algorithm 1.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchless.federated.accounting import steps_of
from batchless.federated.privacy import PrivacySettings, sampled_by_coins
from batchless.train import Clip


def drawn_steps(
    privacy: PrivacySettings, images: int, *, images_per_step: int, words: Sequence[object], seed: int
) -> list[list[int]]:
    """The images of each step of an epoch, each in it with probability q independently; a step may have none.

    Args:
        privacy: whose random numbers.
        images: n, of the client.
        images_per_step: B.
        words: that name client, round and epoch.
        seed: of the run.
    """
    q, steps = steps_of(images, images_per_step=images_per_step)
    generator = privacy.generator("images", *words, seed=seed)
    return [list(sampled_by_coins(images, probability=q, generator=generator)) for _ in range(steps)]


class NoisedStep:
    """One optimizer step of DP-SGD in the making; `backward_sum` is called once for each micro-batch."""

    def __init__(self, model: nn.Module, *, clip_norm: float) -> None:
        self.clip_norm = clip_norm
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums = [torch.zeros_like(parameter) for parameter in self.parameters]

    def backward_sum(self, summed_loss: Tensor, samples: int | Tensor, images: int | Tensor | None = None) -> None:
        """Add the clipped gradients of a micro-batch's images; arguments as those of `batchless.accumulate`'s step."""
        mean_loss = summed_loss / (max(samples, 1) if isinstance(samples, int) else samples.clamp_min(1))
        mean_loss.backward()  # type: ignore[no-untyped-call]
        self._add()

    @torch.no_grad()
    def _add(self) -> None:
        gradients = [taken_gradients(parameter) for parameter in self.parameters]
        found = [each for each in gradients if each is not None]
        if not found:
            return
        squares = [each.flatten(1).square().sum(1, dtype=torch.float64) for each in found]
        factors = (self.clip_norm / torch.stack(squares).sum(0).sqrt()).clamp_max(1.0)
        for sum, each in zip(self.sums, gradients, strict=True):
            if each is not None:
                sum += torch.einsum("n,n...->...", factors.to(each), each)


def taken_gradients(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of each image's loss `[N, ..]`, which Opacus has left with the parameter; it is forgotten there.

    ValueError if the parameter has a gradient, but none of single images.
    """
    attached: Any = parameter
    found: Tensor | None = attached.grad_sample
    if found is None and parameter.grad is not None:
        raise ValueError(
            f"privacy.level=sample: a parameter of shape {tuple(parameter.shape)} is used outside of its layer's forward, "
            "where there are no gradients of single images; choose another network"
        )
    attached.grad_sample, parameter.grad = None, None
    return found


@contextmanager
def per_image_gradients(model: nn.Module) -> Iterator[None]:
    """In the block, backward passes of a mean loss leave each image's gradient in `parameter.grad_sample`.

    By Opacus' hooks; layers that it does not know, such as those with a standardized weight, go through `torch.func`.
    Activations write to new memory meanwhile: hooks on a layer's output forbid changing it in place.

    Raises:
        ValueError: a layer whose per-image gradients are not defined.
    """
    from opacus.grad_sample import GradSampleModule

    inplace: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in inplace:
        module.inplace = False
    try:
        with warnings.catch_warnings():
            # Of the first layer, whose input needs no gradient: its hook sees the output's, which is all that is wanted.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            try:
                hooks = GradSampleModule(model, loss_reduction="mean", strict=True)
            except NotImplementedError as error:
                raise ValueError(f"privacy.level=sample: {' '.join(str(error).split())[:200]}") from error
            try:
                yield
            finally:
                hooks.remove_hooks()
                for parameter in model.parameters():
                    for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                        if hasattr(parameter, name):
                            delattr(parameter, name)
    finally:
        for module in inplace:
            module.inplace = True


@contextmanager
def noised(
    model: nn.Module,
    optimizer: Optimizer,
    privacy: PrivacySettings,
    *,
    images_per_step: int,
    clip: Clip | None,
    words: Sequence[object],
    seed: int,
) -> Iterator[NoisedStep]:
    """One optimizer step on the noised sum of clipped gradients; inside `per_image_gradients`.

    Args:
        model: all of whose trainable parameters get a gradient, noise alone where no image came by.
        optimizer: steps once.
        privacy: C and sigma.
        images_per_step: B.
        clip: called with the model after the noise was added.
        words: that name client, round and step.
        seed: of the run.
    """
    step = NoisedStep(model, clip_norm=privacy.clip_norm)
    yield step
    generator = privacy.generator("gradients", *words, seed=seed)
    for parameter, sum in zip(step.parameters, step.sums, strict=True):
        if privacy.noise_multiplier:
            noise = torch.from_numpy(generator.standard_normal(sum.shape)).to(sum)
            sum.add_(noise, alpha=privacy.noise_std)
        parameter.grad = sum.div_(images_per_step)
    if clip is not None:
        clip(model)
    optimizer.step()
    optimizer.zero_grad()
