"""Conversion and folding of whole libraries of architectures: what must hold of any model, tried on each."""

import copy
import gc
import pickle
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batchless as bl
from architectures import HEAVY, SEGMENTATION_MODELS, TIMM, TORCHVISION, Architecture
from batchless.nn.normalizer import Bcn, Bn, FrozenBn, SyncBn, parse_normalizer
from batchless.surgery import ConversionReport, conversion_of

# The libraries' own deprecations, and few values per group where images are as small as here.
pytestmark = pytest.mark.filterwarnings("ignore")

_NAMES = (
    "relu hardtanh leaky_relu elu celu selu silu gelu mish hardswish softplus sigmoid hardsigmoid tanh _prelu_kernel"
)
ACTIVATIONS = frozenset(_NAMES.split())
"""Activations as torch's operators name them."""


@pytest.fixture(autouse=True)
def _free():
    """Models refer to themselves: without this, gigabytes of them wait for a garbage collector that counts objects."""
    yield
    gc.collect()


class ActivationCalls(TorchDispatchMode):
    """Counts the calls of activation operators, whether a module, a function or a method made them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")  # in place or not
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
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), ActivationCalls() as calls:
        model.eval()(*arguments)
    for module, training in modes:
        module.training = training
    for handle in handles:
        handle.remove()
    return calls.counts, modules


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "FrozenBatchNorm" in type(module).__name__


@torch.no_grad()
def randomized_norms(model: nn.Module) -> nn.Module:
    """`model` after giving batch normalizations random affine maps and statistics; zero gains stay zero."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if not is_batch_norm(module):
            continue
        for name, centre in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            value = getattr(module, name)
            if value is not None and (name != "weight" or value.any()):
                value.copy_(centre + 0.6 * (torch.rand(value.shape, generator=generator) - 0.5))
    return model


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """`model` after moving all that normalizations hold, zero gains and fresh estimates too: folding it wrongly shows."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if is_batch_norm(module) or type(module).__module__.startswith(("batchless.nn", "torch.nn.modules.norm")):
            for name in ("gain", "weight", "bias", "running_mean", "running_var"):
                value = getattr(module, name, None)
                if isinstance(value, Tensor) and value.dim() <= 1:
                    noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
                    value.mul_(0.9 + 0.2 * noise).add_(0.1 * noise)
    return model


def gradients(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Gradients by name of a training forward's loss."""
    leaves = [leaf for leaf in tensors(model.train()(*arguments)) if leaf.requires_grad]
    loss = sum((leaf.square().mean() for leaf in leaves), start=torch.zeros(()))
    assert bool(loss.isfinite()), f"the loss is {loss}"
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output: of tuples, named ones and the libraries' own too, lists and dictionaries."""
    return [
        leaf for leaf in tree_leaves(list(output) if isinstance(output, tuple) else output) if isinstance(leaf, Tensor)
    ]


@dataclass(frozen=True)
class Original:
    """An architecture's model, and what its conversions are compared with."""

    architecture: Architecture
    model: nn.Module
    activations: tuple[Counter[str], Counter[str]]
    gradients: dict[str, Tensor | None]


def original(architecture: Architecture) -> Original:
    """Build the architecture and run it."""
    model = randomized_norms(architecture.build())
    activations = activation_calls(model, architecture.arguments(1))
    # Two images: batch statistics need more than one value per channel.
    found = gradients(copy.deepcopy(model), architecture.training_arguments(2))
    return Original(architecture, model, activations, found)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All but the numbers of what a conversion must leave alone in the model it is given."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    trainable = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return modules, trainable, hooks


def check_convert(before: Original, normalizer: str) -> tuple[nn.Module, ConversionReport]:
    """Convert strictly; the model given and the random state are as before."""
    model = before.model
    shape, state, random = snapshot(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    converted, report = bl.convert(model, normalizer, example=before.architecture.arguments(1), strict=True)
    assert torch.equal(random, torch.get_rng_state())
    assert snapshot(model) == shape
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in converted.parameters()})
    modes = {name: module.training for name, module in converted.named_modules()}
    assert all(modes.get(name, module.training) == module.training for name, module in model.named_modules())
    return converted, report


def check_activations(before: Original, converted: nn.Module) -> None:
    """As many activation calls as before, of each kind."""
    assert activation_calls(converted, before.architecture.arguments(1)) == before.activations


def check_copies(converted: nn.Module, report: ConversionReport, normalizer: str) -> None:
    """Converting again, copying and pickling keep the model, its report and its pairs."""
    again, second = bl.convert(converted, normalizer)  # a deep copy
    assert second == report
    state = converted.state_dict()
    for other in (again, pickle.loads(pickle.dumps(converted))):
        assert conversion_of(other) == conversion_of(converted)
        assert [type(m) for m in other.modules()] == [type(m) for m in converted.modules()]
        assert other.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def check_backward(before: Original, converted: nn.Module, normalizer: str) -> None:
    """Forward and backward, on one image unless the batch is normalized, are finite and reach all that was reached."""
    samples = 2 if isinstance(parse_normalizer(normalizer).act, Bn | SyncBn | Bcn) else 1
    after = gradients(converted, before.architecture.training_arguments(samples))
    for name, gradient in after.items():
        assert gradient is None or bool(gradient.isfinite().all()), f"gradient of {name}"
    trainable = {name for name, p in converted.named_parameters() if p.requires_grad}
    reached = {name for name, gradient in before.gradients.items() if gradient is not None}
    lost = {name for name in trainable & reached if after[name] is None}
    assert not lost, f"no gradient any more: {sorted(lost)}"
    unused = tuple(name.rpartition(".")[0] for name in before.gradients.keys() - reached)
    new = {name for name in trainable - before.gradients.keys() if after[name] is None and not name.startswith(unused)}
    assert not new, f"new parameters without gradient: {sorted(new)}"


def outputs(architecture: Architecture, model: nn.Module) -> list[Tensor]:
    """All tensors of an evaluation forward; a detector's parts' too, since it may find nothing."""
    found: list[Tensor] = []
    parts = ("backbone", "rpn.head", "head", "roi_heads.box_head", "roi_heads.mask_head", "roi_heads.keypoint_head")
    handles = [
        part.register_forward_hook(lambda module, inputs, output: found.extend(tensors(output)))
        for name, part in model.named_modules()
        if architecture.detector and name in parts
    ]
    with torch.no_grad():
        output = model(*architecture.arguments(1, dtype=architecture.precision))
    for handle in handles:
        handle.remove()
    return found + tensors(output)


def check_fold(before: Original, converted: nn.Module, normalizer: str) -> None:
    """Folding gives the same outputs without a layer of this package."""
    precision = before.architecture.precision
    tolerance = 1e-9 if precision == torch.float64 else 1e-4
    converted.zero_grad()
    model = converted.to(precision).eval()
    if isinstance(parse_normalizer(normalizer).act, Bn | SyncBn | FrozenBn):
        # By statistics that are not its inputs' the signal would grow from layer to layer until rounding is all that is left.
        bl.recalibrate(model, [before.architecture.arguments(2, dtype=precision)])
    model = perturbed(model)
    folded = bl.fold(model)
    assert not {type(m).__name__ for m in folded.modules() if type(m).__module__.startswith("batchless")}
    expected, got = outputs(before.architecture, model), outputs(before.architecture, folded)
    assert len(expected) == len(got) > 0
    for a, b in zip(expected, got, strict=True):
        assert bool(a.isfinite().all()), "the output is not finite"
        assert a.shape == b.shape
        if a.is_floating_point() and a.numel():
            error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
            assert error <= tolerance, f"relative error {error:.1e}"


def check(before: Original, normalizer: str) -> None:
    """All that must hold of one conversion."""
    converted, report = check_convert(before, normalizer)
    check_activations(before, converted)
    check_copies(converted, report, normalizer)
    check_backward(before, converted, normalizer)
    check_fold(before, converted, normalizer)


EVERY = [*TORCHVISION, *TIMM, *SEGMENTATION_MODELS]
NORMALIZERS = ("gn+ws", "bcn-micro+ws", "none+sws")
OTHERS = ("ln", "in", "frozen-bn", "bcn+ws", "sync-bn+cwn", "bn+ws")
LIGHT = [architecture for architecture in EVERY if architecture.name not in HEAVY]


@pytest.mark.parametrize(
    ("architecture", "normalizer"),
    [
        pytest.param(architecture, normalizer, id=f"{architecture.name}-{normalizer}")
        # Each light architecture with one normalizer, in turn; the slow run takes the heavy ones and all combinations.
        for position, architecture in enumerate(LIGHT)
        for normalizer in [NORMALIZERS[position % len(NORMALIZERS)]]
    ],
)
def test_a_conversion(architecture, normalizer):
    check(original(architecture), normalizer)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EVERY, ids=lambda architecture: architecture.name)
def test_all_conversions(architecture):
    before = original(architecture)
    for normalizer in NORMALIZERS:
        check(before, normalizer)


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", OTHERS)
@pytest.mark.parametrize("architecture", LIGHT, ids=lambda architecture: architecture.name)
def test_a_conversion_to_another_normalizer(architecture, normalizer):
    try:
        check(original(architecture), normalizer)
    except ValueError as error:
        # Normalizations of pooled vectors (attention over channels, pyramids): `in` needs space.
        if normalizer != "in" or "instance normalization needs an input with space" not in str(error):
            raise


def test_the_default_run_is_wide():
    names = {architecture.name for architecture in EVERY}
    assert names >= HEAVY
    light = Counter(name.partition(":")[0] for name in names - HEAVY)
    assert light["timm"] >= 40
    assert light["torchvision"] >= 60
