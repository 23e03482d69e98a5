"""What each tensor of a network is, by the type of its module, and what an algorithm does with it."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from batchless.federated.algorithms import KINDS, Algorithm, FedBN, FedProx, FedWon, FixBN, SiloBN, Standalone
from batchless.federated.algorithms import Kind as Kind
from batchless.federated.server_optimizers import Average
from batchless.surgery.recognize import is_normalization

_AFFINE_BUFFERS = ("weight", "bias")
"""The gain and bias of normalizations that hold them as constants."""


def tensor_kinds(model: nn.Module) -> dict[str, Kind]:
    """The kind of every tensor in the state dict, in its order.

    - `affine`: gains and biases of normalization layers, whatever library they come from, ours included.
    - `statistic`: all other float buffers of normalization layers: running statistics and estimates.
    - `counter`: integer buffers of any module.
    - `weight`: everything else, the scalar gain of SkipInit and constants of other modules too.

    ValueError for a state dict with something that is no parameter or buffer of a module.

    >>> from torch import nn
    >>> list(tensor_kinds(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))).values())
    ['weight', 'affine', 'affine', 'statistic', 'statistic', 'counter']
    """
    kinds = {name: _kind(module, own_name, tensor) for name, module, own_name, tensor in _tensors(model)}
    state = model.state_dict()
    for name in state:
        if name not in kinds:
            raise ValueError(
                f"{name} in the state dict of {type(model).__name__} is no parameter or buffer of a module"
            )
    return {name: kinds[name] for name in state}


def trainable_tensors(model: nn.Module) -> frozenset[str]:
    """The state-dict keys of the parameters that require a gradient; a shared parameter has all its names here."""
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)


def local_names(algorithm: Algorithm, kinds: Mapping[str, Kind]) -> frozenset[str]:
    """The tensors that stay with the client."""
    return frozenset(name for name, kind in kinds.items() if kind in algorithm.local)


def explain(algorithm: Algorithm, model: nn.Module) -> str:
    """A table of what happens to each kind of tensor of `model`; a last line if that makes no difference to FedAvg.

    >>> print(explain(FedBN(), nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))))
    fedbn: clients weigh by images, the server takes the average
    kind       tensors  elements  what happens to it
    weight           1        12  averaged
    affine           2         8  stays with the client
    statistic        2         8  stays with the client
    counter          1         1  stays with the client
    evaluated: each client's own model on its own domain
    without layers of its own: the initial ones, statistics estimated anew on images without labels
    """
    kinds, state = tensor_kinds(model), model.state_dict()
    server = "the average" if isinstance(algorithm.server, Average) else f"a step of {algorithm.server} towards it"
    weighting = (
        f"clients weigh {'by images' if algorithm.weighting == 'images' else 'the same'}, the server takes {server}"
    )
    lines = [
        f"{algorithm.name}: {'nothing is averaged' if isinstance(algorithm, Standalone) else weighting}",
        f"{'kind':<9}  {'tensors':>7}  {'elements':>8}  what happens to it",
    ]
    for kind in KINDS:
        tensors = [state[name] for name in kinds if kinds[name] == kind]
        if tensors:
            elements = sum(tensor.numel() for tensor in tensors)
            lines.append(f"{kind:<9}  {len(tensors):>7}  {elements:>8}  {_fate(algorithm, kind)}")
    lines.append(f"evaluated: {_evaluated(algorithm)}")
    return "\n".join([*lines, *_notes(algorithm, model, frozenset(kinds.values()))])


def _evaluated(algorithm: Algorithm) -> str:
    if not algorithm.local:
        return "the global model on every domain"
    own = "each client's own model on its own domain"
    match algorithm:
        case SiloBN(unseen="reestimate") | FedBN(unseen="reestimate"):
            return f"{own}\nwithout layers of its own: the initial ones, statistics estimated anew on images without labels"
        case SiloBN() | FedBN():
            return f"{own}\nwithout layers of its own: the mean of all clients' layers"
    return own


def _fate(algorithm: Algorithm, kind: Kind) -> str:
    if kind in algorithm.local:
        return "stays with the client"
    if kind == "counter":
        return "the maximum is taken"
    if kind == "statistic" and isinstance(algorithm, FixBN):
        return f"averaged, then frozen after {algorithm.freeze_after:.0%} of the rounds"
    if kind in ("weight", "affine") and not isinstance(algorithm.server, Average):
        return f"averaged, {algorithm.server.name} steps towards the mean where it is trained"
    return "averaged"


def _notes(algorithm: Algorithm, model: nn.Module, present: frozenset[Kind]) -> Iterator[str]:
    """Where the algorithm is FedAvg under another name on this network, or is not what its name says."""
    same = f"{algorithm.name} makes no difference to fedavg here"
    normalizations = any(is_normalization(module) for module in model.modules())
    if isinstance(algorithm, FedProx) and algorithm.mu == 0:
        yield f"{same}: mu is 0"
    if isinstance(algorithm, FixBN) and "statistic" not in present:
        yield f"{same}: no layer of this network has running statistics to freeze"
    if isinstance(algorithm, FedWon) and normalizations:
        yield "this network still has normalization layers: that is fedavg, not fedwon (convert it to none+sws)"
    if algorithm.local and not isinstance(algorithm, Standalone) and not algorithm.local & present - {"counter"}:
        what = "normalization layers" if "affine" in algorithm.local else "running statistics"
        yield f"{same}: this network has no {what} that would stay with the client"


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """State-dict key, module, name there and tensor of every parameter and buffer, shared modules under all their names."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            yield f"{module_name}.{name}".lstrip("."), module, name, tensor


def _kind(module: nn.Module, name: str, tensor: Tensor) -> Kind:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "counter"
    if not is_normalization(module):
        return "weight"
    if isinstance(tensor, nn.Parameter) or name in _AFFINE_BUFFERS:
        return "affine"
    return "statistic"
