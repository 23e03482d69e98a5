"""Pickles of builtin values and integer arrays, read without trusting them."""

import io
import pickle
from collections.abc import Callable
from math import prod
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray


def restricted_load(content: bytes) -> object:
    """What the pickle holds; its arrays are `PickledArray`.

    Nothing from outside this file is ever imported or called for a pickle: array reconstruction is replaced by checks and
    `numpy.frombuffer`, and any other name in it is refused. A damaged pickle can raise nearly any exception.
    """
    return _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()


def as_text(value: object) -> str:
    """Text whichever Python wrote it: Python 2's came as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _DType:
    """Stands for `numpy.dtype` in a pickle: an integer type."""

    def __init__(self, name: str | bytes, align: object = None, copy: object = None) -> None:
        self.name = as_text(name)
        if self.name not in ("u1", "i1", "i2", "i4", "i8"):
            raise pickle.UnpicklingError(f"an array of type {self.name!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if as_text(state[1]) == ">":
            raise pickle.UnpicklingError("a big-endian array")


class PickledArray:
    """Stands for an array while it is unpickled: what its pickled state says, checked."""

    values: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if type(dtype) is not _DType or type(raw) not in (bytes, bytearray) or type(shape) is not tuple:
            raise pickle.UnpicklingError("a malformed array")
        flat = np.frombuffer(raw, "<" + dtype.name)
        if not all(type(size) is int and size >= 0 for size in shape) or flat.size != prod(shape):
            raise pickle.UnpicklingError(f"an array of shape {shape} with {flat.size} values")
        self.values = np.array(flat.reshape(shape, order="F" if fortran else "C"), order="C")


def _reconstruct(subtype: object, shape: object, typecode: object) -> PickledArray:
    """`numpy.core.multiarray._reconstruct`: an empty array, whose state follows."""
    return PickledArray()


def _frombuffer(raw: object, dtype: object, shape: object, order: object) -> PickledArray:
    """`numpy.core.numeric._frombuffer`: how protocol 5 has arrays."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: object, encoding: object) -> bytes:
    """`_codecs.encode`: how Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


class _Sealed:
    """A callable that a pickle can only call: it has no attributes that a BUILD instruction could set."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("a state for a function")


_KNOWN: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _Sealed(_DType),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever handed to _reconstruct, which does not look at it
    ("numpy.core.multiarray", "_reconstruct"): _Sealed(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Sealed(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): _Sealed(_frombuffer),
    ("numpy._core.numeric", "_frombuffer"): _Sealed(_frombuffer),
    ("_codecs", "encode"): _Sealed(_encode),
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image data has no use for: refused")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside the file: refused")
