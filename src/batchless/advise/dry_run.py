"""One training forward of a copy that survives the layers that raise, and what every normalization met in it."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchless.models.example import detection_targets, is_detector
from batchless.surgery.dataflow import as_arguments
from batchless.surgery.recognize import is_normalization
from batchless.surgery.swap import copy_of

Mode = Literal["training", "evaluation"]


@dataclass
class Visit:
    """What one normalization met.

    Attributes:
        name: its qualified name.
        module: it, in the copy that ran.
        shapes: of its input, a shape for each call.
        error: what it raised first, None if nothing.
    """

    name: str
    module: nn.Module
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class DryRun:
    """A forward of a copy of a model.

    Attributes:
        visits: one for each normalization, in the model's order.
        images: how many images ran.
        mode: `evaluation` where the training forward asks for more than was given; the normalizations were in training
            mode then too.
        failed: the layer that fails at the images asked for and does not at more, and its error; normalizations that
            fail are not meant (`Visit.error`), nor are models that never run.
    """

    visits: tuple[Visit, ...]
    images: int
    mode: Mode
    failed: tuple[str, str] | None = None


def dry_run(model: nn.Module, example: object, *, images: int) -> DryRun:
    """Run a copy of `model` on `images` images made of the example's: in training mode, without gradients.

    Raises:
        ValueError: the model does not run on the example at all, or there are no images in it.
    """
    arguments = as_arguments(example)
    if is_detector(model) and len(arguments) == 1 and isinstance(arguments[0], list):
        arguments = (*arguments, detection_targets(arguments[0]))
    few = with_images(arguments, images)
    visits, training_error = _forward(model, few, mode="training")
    if training_error is None:
        return DryRun(visits, images, "training")
    if images == 1:
        visits, error = _forward(model, with_images(arguments, 2), mode="training")
        if error is None:
            return DryRun(visits, 2, "training", failed=training_error)
    visits, error = _forward(model, few, mode="evaluation")
    if error is None:
        return DryRun(visits, images, "evaluation")
    layer, message = training_error
    raise ValueError(
        f"the model does not run on the example (layer {layer or '(model)'}: {message}): pass what its forward takes, "
        "a tensor or a tuple of positional arguments, or images of another size"
    )


def _forward(
    model: nn.Module, arguments: tuple[Any, ...], *, mode: Mode
) -> tuple[tuple[Visit, ...], tuple[str, str] | None]:
    """What each normalization met, and which layer failed and how."""
    # `train` is the model's own: it may keep parts of itself in evaluation mode, as a fine-tuned backbone does.
    probe = copy_of(model) if model.training else copy_of(model).train()
    visits, running = [], _track_layers(probe)
    for name, module in probe.named_modules():
        if is_normalization(module):
            visits.append(Visit(name, module))
    modes = [visit.module.training for visit in visits]
    if mode == "evaluation":
        probe.eval()
    for visit, training in zip(visits, modes, strict=True):
        visit.module.training = training
        _watch(visit, running)
    devices = {tensor.device for tensor in (*probe.parameters(), *probe.buffers()) if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few values in a group are a finding here
            probe(*copy.deepcopy(tree_map(_detached, arguments)))
    except Exception as error:
        return tuple(visits), (running[-1] if running else "", _one_line(error))
    return tuple(visits), None


def _track_layers(probe: nn.Module) -> list[str]:
    """The names of the layers that are running, innermost last; an exception leaves them as they were when it came."""
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, inputs: running.append(name)

    for name, module in probe.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(lambda module, inputs, output: running.pop() and None)
    return running


def _watch(visit: Visit, running: list[str]) -> None:
    """Record the input's shape at each call; where the layer raises, record that and hand the input on."""
    forward = visit.module.forward

    def watched(*inputs: Any, **keywords: Any) -> Any:
        x: Tensor = inputs[0] if inputs else next(iter(keywords.values()))
        visit.shapes.append(tuple(x.shape))
        depth = len(running)
        try:
            return forward(*inputs, **keywords)
        except Exception as error:
            visit.error = visit.error or _one_line(error)
            del running[depth:]
            return x.clone()

    visit.module.forward = watched


def with_images(arguments: tuple[Any, ...], images: int) -> tuple[Any, ...]:
    """The arguments with the example's images cut or repeated to `images`: in every list and tensor as long as its batch.

    >>> [len(x) for x in with_images((torch.zeros(4, 3), torch.zeros(7), [1, 2, 3, 4]), 2)]
    [2, 7, 2]
    """
    given = next((length for value in arguments if (length := _length(value))), None)
    if given is None:
        raise ValueError(
            "the example holds no images: pass a tensor [N, ..] or a list of images, or a tuple of arguments"
        )
    chosen = [index % given for index in range(images)]

    def sized(value: Any) -> Any:
        if _length(value) != given:
            return value
        return value[chosen] if isinstance(value, Tensor) else [value[index] for index in chosen]

    return tuple(sized(value) for value in arguments)


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) or (isinstance(value, Tensor) and value.dim()) else 0


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
