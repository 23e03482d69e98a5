"""Rows of a matrix standardized: for autograd, or into memory that is there already and back over the gradient's own.

Letters: O rows (output channels), I values in each (the fan-in).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 2**20
"""Rows that are read twice, or written and read again, are taken so many bytes at a time, so that they stay in the cache."""


@dataclass(frozen=True)
class RowStandardization:
    """The map `R_hat_ij = factor * (R_ij - mu_i) / sqrt(var_i + eps)`, `mu_i` and `var_i` the mean and variance of row i.

    Attributes:
        eps: added to the variance.
        factor: one for all rows, or `[O]`.
    """

    eps: float
    factor: float | Tensor = 1.0

    def __call__(self, rows: Tensor) -> Tensor:
        """The standardized rows `[O, I]`, differentiable; a row of equal values becomes 0, with finite gradients."""
        outputs = len(rows)
        per_row = self._per_row(rows)
        if per_row is None and not torch.compiler.is_compiling():
            standardized: Tensor = _StandardizeRows.apply(rows, self.eps)[0]
            return standardized
        return F.group_norm(from_first(rows).unsqueeze(0), outputs, per_row, eps=self.eps).squeeze(0)

    def _per_row(self, rows: Tensor) -> Tensor | None:
        if isinstance(self.factor, Tensor):
            return self.factor.to(rows.dtype)
        return None if self.factor == 1.0 else rows.new_full((len(rows),), self.factor)


@dataclass(frozen=True)
class WrittenRows:
    """Standardized rows whose values lie in memory given by the caller, with what their pullback needs.

    Attributes:
        rows: R `[O, I]`, not to be changed before the pullback.
        factor: of the map.
        moments: mean and reciprocal deviation of each chunk's rows, `[k, 1]` each; with a
            factor, of rows minus their first value.
        chunk: rows of a chunk, but for the last.
    """

    rows: Tensor
    factor: float
    moments: list[tuple[Tensor, Tensor]]
    chunk: int

    @classmethod
    @torch.no_grad()
    def write(cls, rule: RowStandardization, rows: Tensor, out: Tensor) -> "WrittenRows":
        """Put `rule(rows)` into `out`, both contiguous `[O, I]`; the rule's factor is a number."""
        assert not isinstance(rule.factor, Tensor)
        inputs = rows.shape[1]
        chunk = max(1, _CHUNK_BYTES // (inputs * rows.element_size()))
        moments = []
        for part, target in zip(torch.split(rows, chunk), torch.split(out, chunk), strict=True):
            outputs, per_row = len(part), rule._per_row(part)
            normalized, mean, rstd = torch.ops.aten.native_group_norm(
                part if per_row is None else from_first(part), per_row, None, 1, outputs, inputs, outputs, rule.eps
            )
            target.copy_(normalized.view_as(target))
            moments.append((mean.view(outputs, 1), rstd.view(outputs, 1)))
        return cls(rows=rows, factor=rule.factor, moments=moments, chunk=chunk)

    @torch.no_grad()
    def pull_back(self, gradient: Tensor) -> None:
        """Replace the gradient of the standardized rows, contiguous `[O, I]`, by that of the rows."""
        for part, rows, (mean, rstd) in zip(
            torch.split(gradient, self.chunk), torch.split(self.rows, self.chunk), self.moments, strict=True
        ):
            if self.factor == 1.0:
                part.copy_(_pulled_back(part, rows, mean, rstd))
            else:
                torch.mul(_pulled_back(part, from_first(rows), mean, rstd), self.factor, out=part)


class _StandardizeRows(torch.autograd.Function):
    """`(R - mu) / sqrt(var + eps)` per row, by the two fastest fused kernels there are for it.

    Forward: group normalization of a single "sample" whose groups are the rows; backward: that of layer normalization, which
    is the same map. Measured by `python -m bench weights`: each is faster in its direction than the other's own, the pair
    takes under half the time of timm's batch_norm form (which leaves 1e-5 in a row of equal values besides), and three
    separate reductions take ten times as long. The backward is differentiable again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        outputs, inputs = rows.shape
        normalized, mean, rstd = torch.ops.aten.native_group_norm(rows, None, None, 1, outputs, inputs, outputs, eps)
        return normalized, mean.view(outputs, 1), rstd.view(outputs, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        rows, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(rows, mean, rstd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
        rows, mean, rstd = ctx.saved_tensors
        return _pulled_back(gradient.contiguous(), rows, mean, rstd), None


def _pulled_back(gradient: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient, rows, [rows.shape[1]], mean, rstd, None, None, [True, False, False]
    )[0]
    return found


def from_first(rows: Tensor) -> Tensor:
    """Each row minus its first value, which changes no result but makes a row of equal values exactly 0.

    Without it the rounding of the mean, divided by a tiny deviation, comes out as anything up to 1. The first value needs no
    gradient, because the result does not depend on it.
    """
    return rows - rows[:, :1].detach()
