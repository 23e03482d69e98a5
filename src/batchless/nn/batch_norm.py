"""Batch normalization for inputs of any rank, with statistics of one device or of all, and its frozen form.

Neither derives from torch's `_BatchNorm`: converters of other libraries that look for that class leave them alone.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from batchless.nn.normalized_samples import NormalizedSamples
from batchless.nn.precision import at_least_float32
from batchless.nn.recomputation import recomputing


class BatchNorm(nn.Module):
    """Normalize each channel by the mean and variance of the batch; running statistics are for evaluation.

    `y = weight_c * (x - m_c) / sqrt(v_c + eps) + bias_c` with `m_c`, `v_c` the mean and biased variance of x over all
    dimensions but the channel's, as `torch.nn.BatchNorm2d`. The running variance is unbiased.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics, torch's meaning.
        sync: whether the statistics are those of all processes together, on any device and backend (gloo too). Every
            process must then make the same number of forwards.
        affine: whether `weight` and `bias` `[C]` exist.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shapes: `[N, C, ..]` to the same.

    Raises:
        ValueError: in training with one value per channel on a single process (its variance is 0 by construction).

    Source: Ioffe & Szegedy, arXiv 1502.03167; cross-device statistics: Peng et al., arXiv 1711.07240.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        sync: bool = False,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.sync = num_features, eps, momentum, sync
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def reset_running_stats(self) -> None:
        """Running mean 0, variance 1, nothing tracked."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` `[N, C, ..]`; a checkpoint that runs it again does not track the statistics again."""
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        track = not recomputing()
        if self.synchronizes():
            return self._synchronized(input, track=track)
        if input.numel() == 0:
            return input * self.weight.sum() if self.weight is not None else input.clone()
        if input.numel() == input.shape[1]:
            raise ValueError(_one_value(tuple(input.shape)))
        if track:
            self.num_batches_tracked.add_(1)
        # A forward that runs again tracks into copies: a checkpoint wants the same tensors saved as the first time.
        mean, var = (buffer if track else buffer.clone() for buffer in (self.running_mean, self.running_var))
        return F.batch_norm(input, mean, var, self.weight, self.bias, True, self.momentum, self.eps)

    def synchronizes(self) -> bool:
        """Whether a training forward would take statistics over several processes."""
        return (
            self.sync and self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )

    @torch.no_grad()
    def statistics(self, x: Tensor, samples: NormalizedSamples) -> tuple[Tensor, Tensor]:
        """The mean and variance `[C]` that a forward of this process alone normalizes `x` by, tracked as the class says.

        `samples` is `normalize_samples(x)`. ValueError as in the forward.
        """
        if not self.training:
            return self.running_mean, self.running_var
        values = x.numel() // x.shape[1]
        if values == 1:
            raise ValueError(_one_value(tuple(x.shape)))
        mean, var = samples.batch_statistics()
        if not recomputing():
            self._track(mean, var * (values / (values - 1)))
        return mean, var

    def _synchronized(self, x: Tensor, *, track: bool) -> Tensor:
        dimensions = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        wide = x.to(at_least_float32(torch.promote_types(x.dtype, self.running_mean.dtype)))
        count = _AllReduceSum.apply(wide.new_full((1,), float(x.numel() // x.shape[1])))
        mean = _AllReduceSum.apply(wide.sum(dimensions)) / count
        centred = wide - mean.view(shape)
        # A second reduction, about the common mean: E[x^2] - E[x]^2 cancels where the mean is large.
        var = _AllReduceSum.apply(centred.square().sum(dimensions)) / count
        if track:
            self._track(mean.detach(), (var * (count / (count - 1).clamp_min(1))).detach())
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        output: Tensor = y.to(x.dtype)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)


class FrozenBatchNorm(nn.Module):
    """Batch normalization whose statistics and affine map are constants: buffers, never trained, in either mode.

    `y = weight_c * (x - m_c) / sqrt(v_c + eps) + bias_c`; what detectors fine-tune with on one or two images.

    Args:
        num_features: C.
        eps: added to the variance.
        device: of the buffers.
        dtype: of the buffers.

    Shapes: `[N, C, ..]` to the same.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` `[N, C, ..]` by the constants."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _one_value(shape: tuple[int, ...]) -> str:
    return (
        f"batch statistics of an input {shape} would be of one value per channel, whose variance is 0: "
        "use more images per forward, or a normalizer without batch statistics (gn, bcn-micro)"
    )


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes; the gradient of a sum that every process uses is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
