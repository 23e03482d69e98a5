"""Conversion and folding of whole libraries of architectures: what must hold of any model, tried on each."""

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest  # noqa
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batchless as bl
from architectures import Architecture
from batchless.nn.normalizer import Bcn, Bn, SyncBn, parse_normalizer
from batchless.surgery import ConversionReport, conversion_of

ACTIVATIONS = frozenset(
    """
    relu hardtanh silu gelu hardswish mish leaky_relu elu celu selu softplus sigmoid tanh hardsigmoid relu6 _prelu_kernel
    log_sigmoid_forward
    """.split()
)


class ActivationCalls(TorchDispatchMode):
    """Counts the calls of activation operators, whether a module, a function or a method made them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        name = name.removesuffix("_")
        if name in ACTIVATIONS:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")


def activation_calls(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Counter[str], Counter[str]]:
    """How often each activation operator and each kind of activation module runs in an evaluation forward."""
    modules: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: modules.update([type(module).__name__]))
        for module in model.modules()
        if is_activation(module)
    ]
    was_training = model.training
    with torch.no_grad(), ActivationCalls() as calls:
        model.eval()(*arguments)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return calls.counts, modules


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "FrozenBatchNorm" in type(module).__name__


@torch.no_grad()
def randomized_norms(model: nn.Module, *, keep_zero_gains: bool) -> nn.Module:
    """`model` after giving batch normalizations an affine map and statistics that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if not is_batch_norm(module):
            continue
        for name, centre in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            value = getattr(module, name)
            if value is None or (keep_zero_gains and name == "weight" and not value.any()):
                continue
            value.copy_(centre + 0.6 * (torch.rand(value.shape, generator=generator) - 0.5))
    return model


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """`model` after moving every normalization's parameters and statistics, so that folding them wrongly shows."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if is_batch_norm(module) or type(module).__module__.startswith(("batchless.nn", "torch.nn.modules.norm")):
            for name in ("gain", "weight", "bias", "running_mean", "running_var"):
                value = getattr(module, name, None)
                if isinstance(value, Tensor) and value.dim() <= 1:
                    value.mul_(1 + 0.2 * (torch.rand(value.shape, generator=generator, dtype=value.dtype) - 0.5))
                    value.add_(0.1 * torch.rand(value.shape, generator=generator, dtype=value.dtype))
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a conversion must leave alone in the model it is given."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def same_snapshot(a: dict[str, Any], b: dict[str, Any]) -> bool:
    states = a.pop("state"), b.pop("state")
    return (
        a == b
        and states[0].keys() == states[1].keys()
        and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    )


def gradients(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Gradients by name of a training forward's loss."""
    model.train()
    output = model(*arguments)
    leaves = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = sum((leaf.square().mean() for leaf in leaves), start=torch.zeros(()))
    assert bool(loss.isfinite()), f"the loss is {loss}"
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _plain(output: Any) -> Any:
    """Outputs of a named tuple or a library's own class as tuples, dictionaries and tensors."""
    return list(output) if isinstance(output, tuple) else output


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that libraries give, and that few values per group on tiny images do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def batch_of(normalizer: str) -> int:
    """Images per training forward: 1, but 2 where the normalizer needs batch statistics."""
    return 2 if isinstance(parse_normalizer(normalizer).act, Bn | SyncBn | Bcn) else 1


def check_convert(architecture: Architecture, model: nn.Module, normalizer: str) -> tuple[nn.Module, ConversionReport]:
    """Convert strictly; the model given and the random state are as before."""
    before, random = snapshot(model), torch.get_rng_state()
    converted, report = bl.convert(model, normalizer, example=architecture.arguments(1), strict=True)
    assert torch.equal(random, torch.get_rng_state())
    assert same_snapshot(before, snapshot(model))
    assert {name: m.training for name, m in converted.named_modules()}.items() >= {
        name: m.training for name, m in model.named_modules() if name in dict(converted.named_modules())
    }.items()
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
    return converted, report


def check_activations(architecture: Architecture, model: nn.Module, converted: nn.Module) -> None:
    arguments = architecture.arguments(1)
    assert activation_calls(converted, arguments) == activation_calls(model, arguments)


def check_backward(
    architecture: Architecture, before: dict[str, Tensor | None], converted: nn.Module, normalizer: str
) -> None:
    """A forward and backward on one image is finite and reaches every parameter that was reached before."""
    after = gradients(copy.deepcopy(converted), architecture.training_arguments(batch_of(normalizer)))
    for name, gradient in after.items():
        assert gradient is None or bool(gradient.isfinite().all()), f"gradient of {name}"
    trainable = {name for name, p in converted.named_parameters() if p.requires_grad}
    lost = {name for name, g in before.items() if g is not None and name in trainable and after[name] is None}
    assert not lost, f"no gradient any more: {sorted(lost)}"
    unused = {name.rpartition(".")[0] for name, gradient in before.items() if gradient is None}
    new = {name for name, g in after.items() if g is None and name in trainable and name not in before}
    new = {name for name in new if not any(name.startswith(prefix) for prefix in unused)}
    assert not new, f"new parameters without gradient: {sorted(new)}"


def outputs(architecture: Architecture, model: nn.Module) -> list[Tensor]:
    """All tensors that an evaluation forward in float64 gives, and for a detector those of its parts."""
    found: list[Tensor] = []
    parts = [m for name, m in model.named_modules() if name in ("backbone", "rpn.head", "head", "roi_heads.box_head")]
    handles = [
        part.register_forward_hook(lambda module, inputs, output: found.extend(_tensors(output)))
        for part in parts
        if architecture.detector
    ]
    with torch.no_grad():
        output = model(*architecture.arguments(2, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    return found + _tensors(output)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]


def check_fold(architecture: Architecture, converted: nn.Module) -> None:
    """Folding gives the same outputs without a layer of this package."""
    model = perturbed(copy.deepcopy(converted).double()).eval()
    folded = bl.fold(model)
    ours = {type(m).__name__ for m in folded.modules() if type(m).__module__.startswith("batchless")}
    assert not ours, f"left: {ours}"
    expected, got = outputs(architecture, model), outputs(architecture, folded)
    assert len(expected) == len(got) > 0
    for a, b in zip(expected, got, strict=True):
        assert bool(a.isfinite().all()), "the output is not finite"
        assert a.shape == b.shape
        if a.is_floating_point():
            error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0
            assert error <= 1e-9, f"relative error {error:.1e}"


def check_again(architecture: Architecture, converted: nn.Module, report: ConversionReport, normalizer: str) -> None:
    """Converting again, copying and pickling keep the model, its report and its pairs."""
    pairs = conversion_of(converted)
    again, second = bl.convert(converted, normalizer, example=architecture.arguments(1))
    assert second == report
    for other in (again, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert conversion_of(other) == pairs
        assert [type(m) for m in other.modules()] == [type(m) for m in converted.modules()]
        a, b = other.state_dict(), converted.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
