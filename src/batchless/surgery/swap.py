"""Copy a model, and put one module in the place of another."""

import copy

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that a forward has computed and left on a module (`weight_norm`'s weight) are copied as values.

    Raises:
        ValueError: a layer whose size is not known yet.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if unsized := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise ValueError(
            f"{type(model).__name__} has layers whose size is not known yet (first: {unsized[0]}): run it once on an input"
        )
    kept = [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    computed = {id(tensor): tensor.detach().clone() for tensor in kept if tensor.grad_fn is not None}
    return copy.deepcopy(model, computed)


class Places:
    """Where each module of a model stands, to put another in its place without searching the model again.

    Args:
        model: changed in place. `self.model` is it, or what came in its own place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = list(model.modules())  # kept alive, so that no new module gets the id of one of them
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in self._modules:
            for name, child in parent._modules.items():
                self._places.setdefault(id(child), []).append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever `old` stands. The mode goes with it, and hooks on the forward and backward pass."""
        _hand_over(old, new)
        if old is self.model:
            self.model = new
        for parent, name in self._places.get(id(old), ()):
            parent._modules[name] = new


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
