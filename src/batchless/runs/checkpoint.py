"""Checkpoints: written atomically, read without running code, loaded into the network they belong to."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchless.runs.atomic import reason, remove_leftovers, replacing

if TYPE_CHECKING:
    from torch import Tensor, nn


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` atomically: a process killed at any moment leaves the earlier checkpoint or the new one.

    `state` may hold tensors, numbers, strings, None, and dicts, lists and tuples of these: what `load_checkpoint`
    reads back. ValueError if the disk is full, read-only or gone.
    """
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with replacing(path) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:
        # A disk that fills up inside torch's zip writer surfaces as a RuntimeError about positions in the archive
        # with the OSError as its context; any other RuntimeError is not about the disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        earlier = "the earlier checkpoint there is intact" if path.exists() else "no checkpoint was there before"
        raise ValueError(f"cannot write the checkpoint {path}: {reason(cause)}; {earlier}") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, accepting tensors and plain values only, so that no file can run code.

    ValueError if there is no such file, if it is not a checkpoint or is damaged, or if it holds other objects.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}{_others(path.parent)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a pickle protocol before it refuses the pickle
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the bytes of a damaged file can make the unpickler raise anything
        raise ValueError(_why_unreadable(path, error)) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of a run: it holds a {type(state).__name__}, not a dict")
    return state


def load_model_state(model: "nn.Module", state: "Mapping[str, Tensor]", *, source: str | Path) -> None:
    """Load `state` into `model`, every key and shape matching; otherwise the model is left as it was.

    `source` names the file in the message of the ValueError that a checkpoint of another network gets.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [str(key) for key in state if key not in own]
    shapes = [
        f"{key} is {_shape(state[key])} there, {_shape(own[key])} in the model"
        for key in own
        if key in state and _shape(state[key]) != _shape(own[key])
    ]
    if missing or unexpected or shapes:
        kinds = ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        found = ", ".join(f"{len(names)} {kind} (first: {names[0]})" for names, kind in kinds if names)
        fix = _likely_fix(missing, unexpected, shapes, state)
        raise ValueError(f"{source} is a checkpoint of another network: keys {found}; {fix}")
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{source} cannot be loaded into the model: {' '.join(str(error).split())}") from error


def _likely_fix(missing: list[str], unexpected: list[str], shapes: list[str], state: Mapping[str, Any]) -> str:
    nested = [key for key, value in state.items() if isinstance(value, Mapping)]
    if nested:
        name = "model" if "model" in nested else nested[0]
        return f"it is a whole checkpoint, not a model's state: pass its entry {name!r}"
    for prefix in ("module.", "_orig_mod."):
        if unexpected and all(key.startswith(prefix) for key in unexpected):
            return f"it was saved from a wrapped model: remove the prefix {prefix!r} from its keys"
    if shapes and not missing and not unexpected:
        return "build the model with the number of classes and the widths given in the config.yaml of that run"
    return "build the model with the same model name and normalizer as in the config.yaml of that run"


def _shape(value: object) -> list[int] | str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else list(shape)


def _why_unreadable(path: Path, error: Exception) -> str:
    text = str(error)
    foreign = re.search(r"GLOBAL (\S+)", text)  # torch's words for a class or function outside its list of safe ones
    if isinstance(error, pickle.UnpicklingError) and foreign:
        return (
            f"{path} was not loaded: it holds {foreign.group(1)}, which could run code on loading; "
            "a checkpoint may hold tensors and plain values only"
        )
    if isinstance(error, OSError):
        return f"cannot read the checkpoint {path}: {reason(error)}"
    # Torch's advice on an unpickling error (load it without the protection) is none to pass on.
    hidden = not text or isinstance(error, pickle.UnpicklingError)
    detail = type(error).__name__ if hidden else f"{type(error).__name__}: {_first_sentence(text)}"
    return f"{path} is not a checkpoint, or is truncated or damaged ({detail}); take an earlier one or copy it again"


def _first_sentence(text: str) -> str:
    return re.split(r"\. |\n", text, maxsplit=1)[0][:160]


def _others(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob("*.pt")) if folder.is_dir() else []
    return f"; in {folder} there is: {', '.join(names)}" if names else f"; {folder} holds no .pt file"
