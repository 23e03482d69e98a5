"""What an optimizer step does for the running estimates of all layers at once: one tensor of sums, one move.

Layer by layer it is ten small operations for each of them: one part in a hundred of a step of ResNet-50 on one image.

Letters: L layers, S their channels together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchless.nn.estimated_batch_norm import EstimatedBatchNorm, move_rate
from batchless.nn.normalized_samples import SampleMoments, moments_about
from batchless.nn.precision import at_least_float32


class StepEstimates:
    """The estimates of a model's layers in an optimizer step: `start`, forwards, `sums`, `move`, `stop`.

    Args:
        layers: that collect from `start` to `stop`, on one device.
    """

    def __init__(self, layers: Sequence[EstimatedBatchNorm]) -> None:
        self._layers = layers
        self._widths = [layer.num_features for layer in layers]
        self._sums: list[Tensor] = []

    def start(self) -> None:
        """Let the layers collect, into one tensor."""
        if not self._layers:
            return
        dtype = torch.float32
        for layer in self._layers:
            dtype = torch.promote_types(dtype, at_least_float32(layer.running_mean.dtype))
        sizes = [2 * width + 1 for width in self._widths]
        flat = self._layers[0].running_mean.new_zeros(sum(sizes), dtype=dtype)
        for layer, step_sums in zip(self._layers, torch.split(flat, sizes), strict=True):
            layer.start_collecting(step_sums)
        self._sums = [flat]

    def stop(self) -> None:
        """Forget the sums."""
        self._sums = []
        for layer in self._layers:
            layer.stop_collecting()

    @torch.no_grad()
    def sums(self) -> list[Tensor]:
        """What the layers have collected, in one tensor (none without layers), which processes may sum in place."""
        by_samples: dict[int, dict[int, SampleMoments]] = {}
        for index, layer in enumerate(self._layers):
            if (found := layer.waiting()) is not None:
                by_samples.setdefault(len(found.mean), {})[index] = found
        for alike in by_samples.values():
            self._add(alike)
        return self._sums

    @torch.no_grad()
    def move(self, images: int | Tensor) -> None:
        """Move the estimates once by `sums`, as the end of an optimizer step does.

        A layer that saw nothing (unused, or only empty batches) stays as it is, and so does a channel whose values were not
        finite.

        Args:
            images: k, the images of the step over all ranks; an int or a 0-d tensor.
        """
        if not self.sums():
            return
        shift, square, count = (torch.cat(parts) for parts in self._parts())  # [S], [S], [L]
        torch._foreach_add_([layer.moves for layer in self._layers], list((count > 0).long().unbind()))
        rate = move_rate(images, torch.stack([layer.memory for layer in self._layers]), self._moves())
        rate, count = self._per_channel(torch.where(count > 0, rate, 0), count.clamp_min(1))
        # A channel that overflowed (a step that a GradScaler skips) stays as it is instead of being lost for good.
        finite = torch.isfinite(shift) & torch.isfinite(square)
        means, variances = ([getattr(layer, of) for layer in self._layers] for of in ("running_mean", "running_var"))
        mean, var = torch.cat(means).to(shift.dtype), torch.cat(variances).to(square.dtype)
        moved_mean = torch.where(finite, mean + rate * (shift / count), mean)
        moved_var = torch.where(finite, torch.lerp(var, square / count, rate), var)
        torch._foreach_copy_(means, torch.split(moved_mean, self._widths))
        torch._foreach_copy_(variances, torch.split(moved_var, self._widths))

    def _parts(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Each layer's sums of x - m and of (x - m)^2 `[C]`, and its count `[1]`."""
        (flat,) = self._sums
        pieces = tuple(torch.split(flat, [size for width in self._widths for size in (width, width, 1)]))
        return pieces[0::3], pieces[1::3], pieces[2::3]

    def _add(self, samples: dict[int, SampleMoments]) -> None:
        """Add what some layers, by their number, have seen of as many samples each: all in the same few operations."""
        chosen = [self._layers[index] for index in samples]
        widths = [layer.num_features for layer in chosen]
        values = [float(each.values) for each in samples.values()]
        found = moments_about(
            torch.cat([layer.running_mean for layer in chosen]),
            mean=torch.cat([each.mean for each in samples.values()], 1),
            rstd=torch.cat([each.rstd for each in samples.values()], 1),
        )
        *sums, counts = ([part[index] for index in samples] for part in self._parts())
        for part, moments in zip(sums, found, strict=True):
            torch._foreach_add_(part, list(torch._foreach_mul(torch.split(moments, widths), values)))
        torch._foreach_add_(counts, values)

    def _moves(self) -> Tensor:
        """`[L]`, of layers without warm-up more than any rate is affected by."""
        never = torch.iinfo(torch.long).max
        return torch.stack(
            [layer.moves if layer.warmup else torch.full_like(layer.moves, never) for layer in self._layers]
        )

    def _per_channel(self, *per_layer: Tensor) -> Sequence[Tensor]:
        """Each `[L]` as `[S]`."""
        together = torch.stack(per_layer)
        pieces = zip(torch.split(together, 1, 1), self._widths, strict=True)
        return torch.cat([piece.expand(-1, width) for piece, width in pieces], 1).unbind()
