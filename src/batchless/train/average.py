"""An exponential moving average of a model's parameters, with a memory in images."""

import copy

import torch
from torch import nn


class ParameterAverage:
    """`a <- (1 - r) a + r w` after each step, `r = max(1 - (1 - 1/memory)^k, 1/t)` for the k images of the t-th step.

    The second part is a warm-up: the first steps are averaged evenly, so the random start is forgotten at once. Buffers are
    those of the model as it is.

    Args:
        model: copied; the copy is `self.model`, in evaluation mode.
        memory: images after which an old image's weight has fallen to 1/e.

    >>> model = nn.Linear(1, 1)
    >>> average = ParameterAverage(model, memory=100)
    >>> average.update(model, images=1)
    >>> bool(average.model.weight == model.weight)
    True
    """

    def __init__(self, model: nn.Module, *, memory: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.memory = memory
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module, *, images: int) -> None:
        """Add the parameters of `model` after a step of `images` images."""
        self.steps += 1
        rate = max(1 - (1 - 1 / self.memory) ** images, 1 / self.steps)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), rate)
        for own, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
