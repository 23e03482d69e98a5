"""Gradient clipping that acts on a model: `clip(model)` changes `.grad` in place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from batchless.nn.precision import at_least_float32
from batchless.nn.weight_matrix import from_matrix, to_matrix

Exclude = Callable[[nn.Module, str, str], bool]
"""`exclude(module, qualified_name, parameter_name)`: whether that parameter of that module is left alone."""


class Clip(Protocol):
    """Anything that changes the gradients of a model's parameters in place."""

    def __call__(self, model: nn.Module) -> None:
        """Clip the `.grad` of the parameters of `model`."""


def exclude_nothing(module: nn.Module, qualified_name: str, parameter_name: str) -> bool:
    """Clip every parameter."""
    return False


@dataclass(frozen=True)
class ClipNorm:
    """Scale all gradients together so that their joint 2-norm is at most `max_norm` (`torch.nn.utils.clip_grad_norm_`)."""

    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"ClipNorm's max_norm must be above 0, got {self.max_norm}")

    def __call__(self, model: nn.Module) -> None:
        """Clip the gradients of `model`."""
        nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)


@dataclass(frozen=True)
class AGC:
    """Adaptive gradient clipping: bound each unit's gradient by a share of that unit's weights.

    For a unit with weights W and gradient G: if `||G|| > clipping * max(||W||, floor)`, then
    `G <- G * clipping * max(||W||, floor) / max(||G||, 1e-6)`. A unit is an output channel (dimension 0; for transposed
    convolutions the output channel of dimension 1 and its group); a tensor with one non-singleton dimension is one unit.
    W is the raw weight, also where a layer standardizes it.

    Args:
        clipping: lambda, above 0; 0.01 to 0.1 in the papers. Large values clip nothing.
        exclude: which parameters are left alone, see `Exclude`; NF-Nets leave out the last linear layer.
        floor: the least norm that W counts as, so that a unit starting at zero can move.

    Raises:
        ValueError: clipping or floor not above 0.

    Source: Brock et al., arXiv 2102.06171, eq. 3; FedWon uses lambda 0.1 at batch 32.

    >>> model = nn.Linear(3, 2)
    >>> for parameter in model.parameters():
    ...     parameter.grad = torch.full_like(parameter, 100.0)
    >>> AGC(0.1, exclude=lambda module, name, parameter: parameter == "bias")(model)
    >>> bool((model.weight.grad.norm(dim=1) <= 0.1001 * model.weight.norm(dim=1)).all()), model.bias.grad.tolist()
    (True, [100.0, 100.0])
    """

    clipping: float
    exclude: Exclude = exclude_nothing
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.clipping > 0 and self.floor > 0):
            raise ValueError(f"AGC's clipping and floor must be above 0, got {self.clipping} and {self.floor}")

    def __call__(self, model: nn.Module) -> None:
        """Clip the gradients of `model`; parameters without a gradient are passed over."""
        # A parameter shared by two modules is left alone if either of them says so, and clipped once.
        done = {id(p) for module, name, own_name, p in _parameters(model) if self.exclude(module, name, own_name)}
        for module, _, _, parameter in _parameters(model):
            if parameter.grad is not None and id(parameter) not in done:
                done.add(id(parameter))
                self._clip(module, parameter, parameter.grad)

    def excluded(self, model: nn.Module) -> list[str]:
        """Qualified names of the parameters that `exclude` leaves out, for a run's report."""
        return [
            f"{name}.{parameter_name}".lstrip(".")
            for module, name, parameter_name, _ in _parameters(model)
            if self.exclude(module, name, parameter_name)
        ]

    @torch.no_grad()
    def _clip(self, module: nn.Module, parameter: Tensor, gradient: Tensor) -> None:
        transposed = isinstance(module, _ConvTransposeNd) and parameter.dim() > 1
        groups = module.groups if isinstance(module, _ConvTransposeNd) else 1
        if parameter.numel() == 0:
            return
        if max(parameter.shape, default=1) == parameter.numel():
            units, changes = parameter.reshape(1, -1), gradient.reshape(1, -1)
        else:
            units = to_matrix(parameter, transposed=transposed, groups=groups)
            changes = to_matrix(gradient, transposed=transposed, groups=groups)
        wide = at_least_float32(parameter.dtype)
        bound = self.clipping * torch.linalg.vector_norm(units, dim=1, keepdim=True, dtype=wide).clamp_min(self.floor)
        norm = torch.linalg.vector_norm(changes, dim=1, keepdim=True, dtype=wide)
        factor = torch.where(norm > bound, bound / norm.clamp_min(1e-6), 1.0)
        if units.shape[0] == 1:
            gradient.mul_(factor.squeeze().to(gradient.dtype))
        elif transposed:
            gradient.mul_(
                from_matrix(factor.expand_as(units), parameter, transposed=True, groups=groups).to(gradient.dtype)
            )
        else:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)).to(gradient.dtype))


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Each parameter with the module that owns it, that module's qualified name, and its own name there."""
    for full_name, module in model.named_modules():
        name = ".".join(part for part in full_name.split(".") if part != "_orig_mod")  # torch.compile's wrapper
        for parameter_name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter_name, parameter
