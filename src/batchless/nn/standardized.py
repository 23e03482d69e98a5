"""Standardize every weight once for several forward and backward passes, exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from batchless.nn.reparameterized import Reparameterized


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
    layers = [
        module for module in model.modules() if isinstance(module, Reparameterized) and module.shared_weight is None
    ]
    versions = [(name, parameter, parameter._version) for name, parameter in model.named_parameters()]
    try:
        edges = [_share(layer) for layer in layers]
        yield
        changed = [name for name, parameter, version in versions if parameter._version != version]
        if changed:
            raise ValueError(
                f"{len(changed)} parameters (first: {changed[0]}) were changed while standardized weights were in use: "
                "step the optimizer after the block"
            )
        for layer, edge in zip(layers, edges, strict=True):
            _pull_back(layer, edge)
    finally:
        for layer in layers:
            if layer.shared_weight is not None:
                layer.shared_weight.grad = None
            layer.shared_weight = None


def _share(layer: Reparameterized) -> GradientEdge | None:
    """Let `layer` use one `W_hat`; the end of its graph, whose own copy of the values is freed here."""
    weight = layer.reparameterized_weight()
    layer.shared_weight = layer.kept_weight.hold(weight)
    return get_gradient_edge(weight) if weight.requires_grad else None


def _pull_back(layer: Reparameterized, edge: GradientEdge | None) -> None:
    shared = layer.shared_weight
    assert shared is not None
    gradient, shared.grad = shared.grad, None  # frees it layer by layer, not all at the end
    if edge is not None and gradient is not None:
        torch.autograd.backward(edge, gradient)
