"""torch.compile as a contestant: Inductor where there is a C++ compiler, otherwise its partitioner alone."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from bench.step import Forward

INDUCTOR = "inductor"
PARTITIONER = "aot_eager_decomp_partition"
"""Traces, decomposes and partitions as Inductor does, and runs torch's kernels one by one: it needs no C++ compiler."""


@functools.cache
def backend_name() -> str:
    """`INDUCTOR` if Inductor can compile a function here, else `PARTITIONER`."""
    compiled = torch.compile(lambda x: x.sin() + 1, backend=INDUCTOR)
    try:
        compiled(torch.ones(4))
    except Exception:  # without a C++ compiler it raises InductorError, with a broken one what that says
        return PARTITIONER
    return INDUCTOR


def compiled(model: nn.Module, *, budget: float = 1.0, backend: str | None = None) -> Forward:
    """`model` compiled whole at its first call, which must be of its training forward.

    Args:
        model: in training mode.
        budget: torch's activation memory budget: 1 keeps what the partitioner would, 0 the inputs only.
        backend: None: `backend_name()`.
    """
    inner = lookup_backend(backend or backend_name())

    def with_budget(graph: Any, inputs: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return inner(graph, inputs)

    # A backend of its own: with a common one a second network of the same shapes would get the first one's code.
    forward: Forward = torch.compile(model, backend=with_budget)
    return forward


def attempt(run: Callable[[], object]) -> tuple[float, str]:
    """Run once, so that what is to be compiled is; the seconds, and why it failed or nothing."""
    begin = time.perf_counter()
    try:
        run()
    except Exception as error:  # a compiler fails in many ways, and each is a finding of its own
        return time.perf_counter() - begin, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return time.perf_counter() - begin, ""


def kept_by_graph(output: Tensor, model: nn.Module) -> tuple[int, int]:
    """Bytes that a compiled forward keeps for its backward pass: of activations, and of weights in another layout.

    Compiled code makes tensors that no operator makes, so they are looked up in the graph of `output`. What the model
    holds anyway is not counted; what has the shape of a weight is one (Inductor lays those of convolutions out anew).
    """
    held = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), *_shared(model)]}
    shapes = {parameter.shape for parameter in model.parameters() if parameter.dim() > 1}
    kept = {}
    for tensor in _saved(output):
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = (storage.nbytes(), tensor.shape in shapes)
    weights = sum(nbytes for nbytes, is_weight in kept.values() if is_weight)
    return sum(nbytes for nbytes, _ in kept.values()) - weights, weights


def _shared(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(shared := getattr(module, "shared_weight", None), Tensor):
            yield shared


def _saved(output: Tensor) -> Iterator[Tensor]:
    """The tensors that the compiled nodes of the output's graph keep."""
    seen, to_do = set(), [output.grad_fn]
    while to_do:
        node: Any = to_do.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from getattr(node, "saved_tensors", ())
        yield from getattr(node, "_tensors_no_vc_check", ())  # that the partitioner has vouched for
        to_do += [below for below, _ in node.next_functions]
