"""Which convolution feeds which normalization, and which activation feeds which convolution."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from batchless.nn.activation_gain import activation_gain
from batchless.surgery.recognize import is_activation, is_convolution, is_normalization


@dataclass(frozen=True)
class Activation:
    """The activation that feeds a layer: its name, and `activation_gain` of it."""

    name: str
    gain: float


UNKNOWN = Activation("unknown", math.nan)
"""What a signal is after an operation whose effect on its distribution is not known."""


@dataclass
class Pairs:
    """What was found out about a model; layers are told by their (first) qualified name.

    - `norms_after`: the normalizations that a convolution or linear layer feeds directly, in every call and nothing else;
      mostly one, several where calls differ (a head over feature maps with a normalization for each).
    - `exclusive`: of these, the layers with one normalization that is fed by nothing else, so that it can be folded into
      them. Only an example's data flow or an `nn.Sequential` proves it.
    - `activation_before`: the activation that feeds a convolution; absent where none does.
    - `unknown_activation`: convolutions whose activation could not be found out.
    - `spatial`: for each normalization the fewest spatial positions its inputs had, and `rank` their dimensions.
    - `overwritten`: normalizations whose output is changed in place while their input is still used elsewhere.
    - `used_elsewhere`: layers that feed a normalization, but not it alone.
    - `seen`: the layers an example reached.
    """

    norms_after: dict[str, tuple[str, ...]] = field(default_factory=dict)
    exclusive: set[str] = field(default_factory=set)
    activation_before: dict[str, Activation] = field(default_factory=dict)
    unknown_activation: set[str] = field(default_factory=set)
    spatial: dict[str, int] = field(default_factory=dict)
    rank: dict[str, int] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)
    used_elsewhere: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def certain(self) -> dict[str, str]:
        """The exclusive layers and their normalization."""
        return {layer: norms[0] for layer, norms in self.norms_after.items() if layer in self.exclusive}

    def feeding(self, norm: str) -> list[str]:
        """The layers that feed a normalization."""
        return [layer for layer, norms in self.norms_after.items() if norm in norms]


def pairs_by_structure(model: nn.Module) -> Pairs:
    """Guess pairs from the order of declaration: a layer and the next normalization of its width in the same container.

    Within an `nn.Sequential` (nested ones run as one) the order is that of execution and the pair certain; in other
    containers activations between the two are passed over, since the order of their declaration says nothing.
    """
    names = {id(module): name for name, module in model.named_modules()}
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = Pairs()
    for container in model.modules():
        if is_convolution(container) or is_normalization(container):
            continue
        children = [child for child in _flattened(container) if not _passes_on(child)]
        ordered = _runs_in_order(container)
        candidates = children if ordered else [child for child in children if not is_activation(child)]
        for layer, following in itertools.pairwise(candidates):
            if not (feeds_norm(layer) and is_normalization(following) and _width(layer) == _norm_width(following)):
                continue
            name = names[id(layer)]
            if ordered:
                known = pairs.norms_after.get(name, ())
                pairs.norms_after[name] = tuple(dict.fromkeys((*known, names[id(following)])))
                if uses[id(layer)] == uses[id(following)] == 1 and is_convolution(layer):
                    pairs.exclusive.add(name)
            else:
                pairs.norms_after.setdefault(name, (names[id(following)],))
        _guess_activations(container, names, pairs)
    return pairs


def feeds_norm(module: nn.Module) -> bool:
    """Whether the module is of the kind whose output a normalization may follow: convolutions and linear layers."""
    return is_convolution(module) or isinstance(module, nn.Linear)


def gain_of(module: nn.Module) -> Activation | None:
    """The activation a module is, with its gain; None if it has none."""
    try:
        return Activation(type(module).__name__, activation_gain(copy.deepcopy(module).double().eval()))
    except (ValueError, RuntimeError, TypeError):
        return None


def _guess_activations(container: nn.Module, names: dict[int, str], pairs: Pairs) -> None:
    kinds = {type(child): child for child in container.children() if is_activation(child)}
    found = gain_of(next(iter(kinds.values()))) if len(kinds) == 1 else None
    for child in container.children():
        if is_convolution(child) and names[id(child)] not in pairs.activation_before:
            if found is None:
                pairs.unknown_activation.add(names[id(child)])
            else:
                pairs.activation_before[names[id(child)]] = found
                pairs.unknown_activation.discard(names[id(child)])


def _flattened(container: nn.Module) -> Iterator[nn.Module]:
    # Not `children()`, which leaves out the second place of a module that stands twice, such as a shared activation.
    for child in container._modules.values():
        if child is not None and _runs_in_order(child):
            yield from _flattened(child)
        elif child is not None:
            yield child


def _runs_in_order(container: nn.Module) -> bool:
    """Whether the module is an `nn.Sequential` in truth: with its forward, and no hook that changes what passes."""
    in_order = isinstance(container, nn.Sequential) and type(container).forward is nn.Sequential.forward
    return in_order and not has_hooks(container)


def _passes_on(module: nn.Module) -> bool:
    """Whether the module gives its input on as it is in evaluation mode; of a subclass, only with the same forward."""
    kinds = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds) and not has_hooks(
        module
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of the user run before or after the module's forward, and may change its input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _width(layer: nn.Module) -> int | None:
    width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    return int(width) if width is not None else None


def _norm_width(norm: nn.Module) -> int | None:
    for attribute in ("num_features", "num_channels"):
        if isinstance(width := getattr(norm, attribute, None), int):
            return width
    weight = getattr(norm, "weight", None)
    return None if weight is None else int(weight.numel())
