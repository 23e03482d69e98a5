"""Pretrained weights from a local file into a network whose classifier may be another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from batchless.models.temporal_shift import SegmentNetwork, TemporalShift
from batchless.runs import load_checkpoint, load_model_state

_WRAPPED_IN = ("model", "state_dict", "model_state_dict")


def load_weights(model: nn.Module, path: str | Path, *, part: bool = False) -> tuple[str, ...]:
    """Load a checkpoint of the same network as it is before conversion; a classifier for other classes stays as it is.

    Known are torch's files (a state dict, or one in an entry `model` or `state_dict`, with or without `module.` before the
    names) and safetensors. No code in them is run. A `SegmentNetwork` also takes the weights of its plain 2D network, such as
    those of ImageNet, and the checkpoints of TSM's authors.

    Args:
        model: built by `build_model`, not converted.
        path: the file.
        part: whether `model` is a part of the checkpoint's network, such as a classifier's body in a detector: what it has
            not is left.

    Returns:
        What was taken and what was not, one sentence each.

    Raises:
        ValueError: no such file, damaged, or of another network.
    """
    path = Path(path)
    state, own = _by_own_keys(_without_prefix(_read(path)), model), model.state_dict()
    if part:
        # torchvision's MobileNets keep their body in `features`, which is the body itself in a segmenter.
        state = {key: value for name, value in state.items() if (key := name.removeprefix("features.")) in own}
    left = [key for key in _classifier_keys(model) if key in state and _other_classes(state[key], own[key])]
    load_model_state(model, {**state, **{key: own[key] for key in left}}, source=path)
    notes = [f"{len(own) - len(left)} tensors of {path.name} were loaded into the network before its conversion"]
    if left:
        classes = f"{state[left[0]].shape[0]} classes, not {own[left[0]].shape[0]}"
        notes.append(f"{', '.join(left)} of {path.name} are for {classes}: the classifier starts at random")
    return tuple(notes)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix != ".safetensors":
        checkpoint = load_checkpoint(path)
        inner = next((checkpoint[key] for key in _WRAPPED_IN if isinstance(checkpoint.get(key), Mapping)), None)
        return checkpoint if inner is None else inner
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged ({' '.join(str(error).split())})") from error


def _without_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the bare network: DistributedDataParallel writes `module.` before every name."""
    prefix = "module."
    if state and all(str(key).startswith(prefix) for key in state):
        return {str(key).removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _by_own_keys(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state of a 2D network, or of TSM's authors, with the keys that the network of segments has for the same tensors."""
    if not isinstance(model, SegmentNetwork):
        return state
    prefix = "base_model."
    wrapped = {
        f"{name}.net.": f"{name}." for name, module in model.named_modules() if isinstance(module, TemporalShift)
    }
    classifier = _classifier_keys(model)
    state = dict(state)
    for key in model.state_dict():
        long = next((long for long in wrapped if key.startswith(long)), "")
        plain = (key.replace(long, wrapped[long], 1) if long else key).removeprefix(prefix)
        others = [plain, f"new_fc.{key.rpartition('.')[2]}"] if key in classifier else [plain]
        found = next((other for other in others if key not in state and other in state), None)
        if found is not None:
            state[key] = state.pop(found)
    return state


def _classifier_keys(model: nn.Module) -> list[str]:
    """The names of the last linear layer's (or convolution's) parameters, which are what depends on the classes."""
    layers = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)
    ]
    if not layers:
        return []
    name, layer = layers[-1]
    return [f"{name}.{key}" if name else key for key, _ in layer.named_parameters(recurse=False)]


def _other_classes(found: object, own: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape[1:] == own.shape[1:] and found.shape[0] != own.shape[0]
