"""The names of normalizers, one grammar for Python, YAML and the command line: `gn(groups=16)+ws(preset=authors)`.

`name := act ['+' weight]`; each part may take settings in parentheses. A part is a frozen dataclass whose fields are its
settings, so that the parser, the printer and the error messages need no list of their own.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from batchless.nn.estimated_batch_norm import Update
from batchless.nn.weight_standardization import resolve_preset


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class Bn:
    """Batch normalization, as the model is built."""

    name: ClassVar[str] = "bn"


@dataclass(frozen=True, kw_only=True)
class FrozenBn:
    """Batch normalization by constants: statistics and affine map are kept and never trained."""

    name: ClassVar[str] = "frozen-bn"


@dataclass(frozen=True, kw_only=True)
class SyncBn:
    """Batch normalization with the statistics of all processes."""

    name: ClassVar[str] = "sync-bn"


@dataclass(frozen=True, kw_only=True)
class Gn:
    """Group normalization; `groups` is the most groups a layer gets (`group_count`)."""

    name: ClassVar[str] = "gn"
    groups: int = 32

    def __post_init__(self) -> None:
        _require(self.groups >= 1, f"gn(groups) must be 1 or more, got {self.groups}")


@dataclass(frozen=True, kw_only=True)
class Ln:
    """Layer normalization over channels and space."""

    name: ClassVar[str] = "ln"


@dataclass(frozen=True, kw_only=True)
class In:
    """Instance normalization: each channel of each sample over space."""

    name: ClassVar[str] = "in"


@dataclass(frozen=True, kw_only=True)
class Bcn:
    """Batch-channel normalization with the batch's statistics; `sync`: of all processes."""

    name: ClassVar[str] = "bcn"
    groups: int = 32
    eps: float = 1e-5
    sync: bool = False

    def __post_init__(self) -> None:
        _require(self.groups >= 1, f"bcn(groups) must be 1 or more, got {self.groups}")
        _require(self.eps > 0, f"bcn(eps) must be above 0, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class BcnMicro:
    """Batch-channel normalization with running estimates; `memory` in images (`EstimatedBatchNorm`)."""

    name: ClassVar[str] = "bcn-micro"
    groups: int = 32
    memory: float = 200.0
    update: Update = "step"
    warmup: bool = True

    def __post_init__(self) -> None:
        _require(self.groups >= 1, f"bcn-micro(groups) must be 1 or more, got {self.groups}")
        _require(self.memory >= 1, f"bcn-micro(memory) is in images and must be 1 or more, got {self.memory}")


@dataclass(frozen=True, kw_only=True)
class NoNorm:
    """No normalization of activations.

    `skip`: `as-built`, a residual branch ends in a SkipInit scalar where the network was built with a zero gain there;
    `skip-init`, every branch of a known residual block does; `alpha-beta`, `x + alpha * f(x / beta)` as in NF-ResNets
    (`branch_betas`), only with `sws`. `alpha`: of `alpha-beta`.
    """

    name: ClassVar[str] = "none"
    skip: Literal["as-built", "skip-init", "alpha-beta"] = "as-built"
    alpha: float = 0.2

    def __post_init__(self) -> None:
        _require(math.isfinite(self.alpha) and self.alpha > 0, f"none(alpha) must be positive, got {self.alpha}")
        _require(self.skip == "alpha-beta" or self.alpha == 0.2, "none(alpha) is of none(skip=alpha-beta) only")


@dataclass(frozen=True, kw_only=True)
class Ws:
    """Weight standardization."""

    name: ClassVar[str] = "ws"
    preset: str = "timm"
    eps: float | None = None

    def __post_init__(self) -> None:
        resolve_preset(self.preset, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Sws:
    """Scaled weight standardization.

    `gamma`: `activation`, the gain of the activation that feeds each convolution; `constant`, ReLU's for all (FedWon's
    reading); or a number for all.
    """

    name: ClassVar[str] = "sws"
    gain: bool = False
    gamma: float | Literal["activation", "constant"] = "activation"
    preset: str = "timm"
    eps: float | None = None

    def __post_init__(self) -> None:
        resolve_preset(self.preset, eps=self.eps)
        if not isinstance(self.gamma, str):
            _require(math.isfinite(self.gamma) and self.gamma > 0, f"sws(gamma) must be positive, got {self.gamma}")


@dataclass(frozen=True, kw_only=True)
class Wn:
    """Weight normalization."""

    name: ClassVar[str] = "wn"


@dataclass(frozen=True, kw_only=True)
class Cwn:
    """Centred weight normalization."""

    name: ClassVar[str] = "cwn"


Act = Bn | FrozenBn | SyncBn | Gn | Ln | In | Bcn | BcnMicro | NoNorm
Weight = Ws | Sws | Wn | Cwn


@dataclass(frozen=True)
class Normalizer:
    """A parsed normalizer name: what normalizes activations, and how weights are reparameterized (None: not).

    >>> str(parse_normalizer("gn( groups = 16 ) + ws(preset=timm)"))
    'gn(groups=16)+ws'
    """

    act: Act
    weight: Weight | None = None

    def __post_init__(self) -> None:
        if isinstance(self.act, NoNorm) and self.act.skip == "alpha-beta":
            _require(
                isinstance(self.weight, Sws),
                "none(skip=alpha-beta) needs branches whose variance is known: write none(skip=alpha-beta)+sws",
            )

    def __str__(self) -> str:
        """The canonical name: only settings that differ from their default, in the order of the fields."""
        return _print_part(self.act) + ("" if self.weight is None else f"+{_print_part(self.weight)}")


def parse_normalizer(name: str | Normalizer) -> Normalizer:
    """The normalizer that `name` says; a `Normalizer` is returned as it is.

    Raises:
        ValueError: unknown name or setting, with what is possible and the nearest match.

    >>> parse_normalizer("bcn-micro(memory=500)+ws").act.memory
    500.0
    """
    if isinstance(name, Normalizer):
        return name
    match = re.fullmatch(r"\s*([\w-]+)\s*(\([^()]*\))?\s*(?:\+\s*([\w-]+)\s*(\([^()]*\))?\s*)?", name)
    if match is None:
        raise ValueError(f"cannot read the normalizer {name!r}: expected {_grammar()}")
    act, act_settings, weight, weight_settings = match.groups()
    parsed_act = _parse_part(act, act_settings, {kind.name: kind for kind in get_args(Act)}, "normalization", name)
    if weight is None:
        return Normalizer(parsed_act)
    kinds = {kind.name: kind for kind in get_args(Weight)}
    return Normalizer(parsed_act, _parse_part(weight, weight_settings, kinds, "weight reparameterization", name))


def _grammar() -> str:
    acts = ", ".join(kind.name for kind in get_args(Act))
    weights = ", ".join(kind.name for kind in get_args(Weight))
    return f"one of {acts}, optionally followed by + and one of {weights}, such as gn+ws or bcn-micro(memory=500)+ws"


def _parse_part(word: str, settings: str | None, kinds: dict[str, Any], role: str, name: str) -> Any:
    if word not in kinds:
        raise ValueError(f"unknown {role} {word!r} in {name!r}{_nearest(word, kinds)}: expected {_grammar()}")
    kind = kinds[word]
    types = get_type_hints(kind)
    possible = {field.name: types[field.name] for field in dataclasses.fields(kind)}
    values: dict[str, object] = {}
    for item in (settings or "()")[1:-1].split(","):
        if not item.strip():
            continue
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or key not in possible:
            takes = ", ".join(possible) or "no settings"
            raise ValueError(f"{word} has no setting {item.strip()!r}{_nearest(key, possible)}: it takes {takes}")
        if key in values:
            raise ValueError(f"{word}({key}) is given twice in {name!r}")
        values[key] = _parse_value(text, possible[key], f"{word}({key})")
    return kind(**values)


def _nearest(word: str, possible: dict[str, Any]) -> str:
    near = difflib.get_close_matches(word, possible, n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _parse_value(text: str, kind: Any, where: str) -> object:
    """Read `text` as the type `kind` of a setting: int, float, bool, a Literal of words, or a union of these."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    if text in words or str in options:
        return text
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in options:
            try:
                return number(text)
            except ValueError:
                continue
    expected = [repr(word) for word in words] + [
        {bool: "true or false", int: "a whole number", float: "a number"}[option]
        for option in options
        if option in (bool, int, float)
    ]
    raise ValueError(f"{where} got {text!r}: expected {' or '.join(expected)}")


def _print_part(part: Act | Weight) -> str:
    changed = [
        f"{field.name}={_print_value(getattr(part, field.name))}"
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    ]
    return part.name + (f"({','.join(changed)})" if changed else "")


def _print_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
