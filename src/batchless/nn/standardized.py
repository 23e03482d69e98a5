"""Standardize every weight once for several forward and backward passes, exactly."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, increment_version

from batchless.nn.reparameterized import Reparameterized
from batchless.nn.standardized_rows import StandardizedRows


@contextmanager
def standardized(model: nn.Module) -> Iterator[None]:
    """Hold `W_hat` of every reparameterized layer of `model` while the block runs; pull its gradient back to W at the end.

    The weights W do not change inside the block, so the Jacobian J of `W_hat(W)` is one for all its passes and
    `sum_k J^T g_k = J^T sum_k g_k`: forward passes share one `W_hat` (a leaf tensor that collects the gradients g_k), and
    one vector-Jacobian product on leaving adds the exact gradient to `W.grad` (and to a learnable gain's).

    `batchless.accumulate` enters it for an optimizer step; enter it around an evaluation loop (there, inside
    `torch.no_grad()`). Layers that already share a weight keep it, so blocks may nest.

    An exception inside the block discards the gradients that `W_hat` collected; parameters without reparameterization
    keep what backward passes added to theirs.

    Raises:
        ValueError: a parameter was changed inside the block (an optimizer step belongs after it).

    >>> from batchless.nn import WSConv2d
    >>> layer = WSConv2d(3, 8, 3)
    >>> with standardized(layer):
    ...     for image in torch.randn(4, 1, 3, 8, 8):
    ...         layer(image).square().mean().backward()
    >>> layer.weight.grad.shape
    torch.Size([8, 3, 3, 3])
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, Reparameterized) and module.shared_weight is None]
    with weights_shared(layers, parameters_of(modules), model):
        yield


@contextmanager
def weights_shared(
    layers: Sequence[Reparameterized], parameters: Sequence[nn.Parameter], model: nn.Module
) -> Iterator[None]:
    """As `standardized`, for layers of `model` that share nothing yet and its parameters, which were looked for before."""
    versions = [parameter._version for parameter in parameters]
    try:
        edges = [_share(layer) for layer in layers]
        yield
        changed = {
            id(parameter)
            for parameter, version in zip(parameters, versions, strict=True)
            if parameter._version != version
        }
        if changed:
            names = (name for name, parameter in model.named_parameters() if id(parameter) in changed)
            first = next(names, "one that is gone")
            raise ValueError(
                f"{len(changed)} parameters (first: {first}) were changed while standardized weights were in use: "
                "step the optimizer after the block"
            )
        for layer, edge in zip(layers, edges, strict=True):
            _pull_back(layer, edge)
    finally:
        for layer in layers:
            _let_go(layer)


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that the modules have themselves, each once: as `model.parameters()`, for a list of modules at hand."""
    found = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
    return list(found.values())


Origin = GradientEdge | StandardizedRows | None
"""How a shared `W_hat` hangs on W: by autograd's graph, as rows standardized at once, or not at all (no gradient wanted)."""


def _share(layer: Reparameterized) -> Origin:
    """Let `layer` use one `W_hat`; how it hangs on W. Of its values there is one copy."""
    weight = layer.weight
    rule = layer.row_map() if _has_plain_rows(layer) else None
    if rule is not None:
        layer.kept_weight.free()
        values, origin = StandardizedRows.of(rule, weight.detach().flatten(1))
        layer.shared_weight = layer.kept_weight.keep(values.view_as(weight))
        return origin
    made = layer.reparameterized_weight()
    layer.shared_weight = layer.kept_weight.hold(made)
    return get_gradient_edge(made) if made.requires_grad else None


def _has_plain_rows(layer: Reparameterized) -> bool:
    """Whether W's rows lie one after the other in the processor's memory, and nobody asks to see its gradient pass."""
    weight = layer.weight
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and torch.is_grad_enabled()
        and weight.is_cpu
        and weight.dtype in (torch.float32, torch.float64)
        and weight.is_contiguous()
        and not layer.transposed
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
        and not torch.compiler.is_compiling()
    )


def _let_go(layer: Reparameterized) -> None:
    """Let `layer` share no weight any more."""
    if layer.shared_weight is not None:
        layer.shared_weight.grad = None
        # So that autograd refuses a backward pass after the block, whose gradient nobody would collect.
        if layer.shared_weight.requires_grad:
            increment_version(layer.shared_weight)
    layer.shared_weight = None


def _pull_back(layer: Reparameterized, origin: Origin) -> None:
    assert layer.shared_weight is not None
    gradient, layer.shared_weight.grad = layer.shared_weight.grad, None  # frees it layer by layer, not all at the end
    if origin is None or gradient is None:
        return
    if isinstance(origin, GradientEdge):
        torch.autograd.backward(origin, gradient)
        return
    # The gradient of W comes into the memory of W_hat, which has done its part, and W_hat into that in the next step.
    _let_go(layer)
    layer.kept_weight.free()
    gradient = origin.pull_back(gradient.detach().contiguous().flatten(1)).view_as(layer.weight)
    layer.kept_weight.keep_memory(gradient)
    if layer.weight.grad is None:
        layer.weight.grad = gradient
    else:
        layer.weight.grad.add_(gradient)
