"""Copy a model, and put one module in the place of another."""

import copy

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; a tensor that is computed and kept (`torch.nn.utils.weight_norm`'s weight) is copied as a value.

    Raises:
        ValueError: a layer whose size is not known yet.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if unsized := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise ValueError(
            f"{type(model).__name__} has layers whose size is not known yet (first: {unsized[0]}): run it once on an input"
        )
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands in `model`, in place; returns the model, which is `new` if `old` was it.

    The mode goes with it, and hooks on the forward and backward pass.
    """
    _hand_over(old, new)
    if old is model:
        return new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


def _hand_over(old: nn.Module, new: nn.Module) -> None:
    kept = set(old.modules())
    for module in new.modules():
        if module not in kept:
            module.training = old.training
    for name, value in vars(old).items():
        if name.startswith(("_forward_", "_backward_")):
            vars(new)[name].update(value)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def keep_own_attributes(old: nn.Module, new: nn.Module) -> None:
    """Set on `new` what a user has set on the layer `old` of torch, such as a mark."""
    for name, value in vars(old).items():
        if name not in vars(new) and name not in getattr(old, "__constants__", ()):
            vars(new)[name] = value
