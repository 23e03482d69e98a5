"""Federated algorithms as values: what is shared, what stays with the client, what is added to its loss.

None has a training loop of its own; `batchless.federated.client` and `server` read these fields. Letters: w the weights,
w_t those at the beginning of round t, T the planned rounds, n_k the training images of client k, n their sum.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from batchless.federated.server_optimizers import SERVER_OPTIMIZERS, Average, ServerOptimizer
from batchless.nn.normalizer import parse_normalizer

Kind = Literal["weight", "affine", "statistic", "counter"]
"""What a tensor of a network is, told by the type of its module (`batchless.federated.sharing.tensor_kinds`)."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Weighting = Literal["images", "equal"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Abstract: what all algorithms have.

    Attributes:
        server: what the server makes of the clients' mean; trainable tensors only, buffers are always averaged.
        weighting: of the clients in the mean: `images`, n_k / n; `equal`, one each, as FedBN's published code has it.
    """

    name: ClassVar[str]
    local: ClassVar[frozenset[Kind]]
    """The kinds of tensors that stay with the client; all others are averaged (counters: the maximum)."""
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Least and largest value of the settings that are numbers."""

    server: ServerOptimizer = field(default_factory=Average)
    weighting: Weighting = "images"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{self.name}: {name} must be {' or '.join(get_args(kind))}, got {getattr(self, name)!r}"
                )
        for name, (least, largest) in self.ranges.items():
            if not least <= getattr(self, name) <= largest or math.isinf(getattr(self, name)):
                raise ValueError(f"{self.name}: {name} must be from {least} to {largest}, got {getattr(self, name)}")
        if "weight" in self.local and not isinstance(self.server, Average):
            raise ValueError(f"{self.name} averages nothing: it has no use for the server optimizer {self.server.name}")


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Every tensor is averaged, running statistics too: `w_{t+1} = sum_k n_k/n w_k`.

    Source: McMahan et al., arXiv 1602.05629, algorithm 1.
    """

    name: ClassVar[str] = "fedavg"
    local: ClassVar[frozenset[Kind]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class FedProx(Algorithm):
    """FedAvg whose clients minimize `loss + mu/2 * sum ||w - w_t||^2` over the trainable tensors.

    The norm is squared and over all tensors in one sum, w_t is the round's start, and the term's gradient `mu (w - w_t)`
    is there from the second local step of every round on (in the first it is 0), before any clipping.

    Attributes:
        mu: 0 or more; 0 is FedAvg, bit for bit. The paper tries 0.001 to 1.

    Source: Li et al., arXiv 1812.06127, eq. 2.
    """

    name: ClassVar[str] = "fedprox"
    local: ClassVar[frozenset[Kind]] = frozenset()
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"mu": (0, math.inf)}
    mu: float = 0.01


Unseen = Literal["reestimate", "mean"]
"""What a client or domain without local layers of its own is evaluated with: the server's initial ones with statistics
estimated anew on its images, which need no labels; or the mean of all clients' layers."""


@dataclass(frozen=True, kw_only=True)
class SiloBN(Algorithm):
    """All but running statistics is averaged; those, and the counters that go with them, stay with the client.

    The counters (`num_batches_tracked`, the moves of estimates) stay too: they say how much a client's own statistics
    have seen, which sets how fast those still move.

    Attributes:
        unseen: how a client or a domain without statistics of its own is evaluated.

    Source: Andreux et al., arXiv 2008.07424, section 3.
    """

    name: ClassVar[str] = "silobn"
    local: ClassVar[frozenset[Kind]] = frozenset({"statistic", "counter"})
    unseen: Unseen = "reestimate"


@dataclass(frozen=True, kw_only=True)
class FedBN(Algorithm):
    """All but normalization layers is averaged; their gains, biases and statistics stay with the client.

    Attributes:
        unseen: how a client or a domain without layers of its own is evaluated.

    Source: Li et al., arXiv 2102.07623, algorithm 1. Their code chooses layers by the letters "bn" in a name, which
    misses the shortcuts of ResNets; here the type of the module decides.
    """

    name: ClassVar[str] = "fedbn"
    local: ClassVar[frozenset[Kind]] = frozenset({"affine", "statistic", "counter"})
    unseen: Unseen = "reestimate"


@dataclass(frozen=True, kw_only=True)
class FixBN(Algorithm):
    """FedAvg until a share of the planned rounds, then normalization by the frozen global statistics.

    In the rounds t = 0, 1, .. with `t >= freeze_after * T` the normalization layers, and only they, are in evaluation
    mode while clients train: their statistics stay what the server had then, gains and biases are still trained.

    Attributes:
        freeze_after: from 0 (always frozen at the initial statistics) to 1 (never: FedAvg).

    Source: Zhong et al., arXiv 2303.06530.
    """

    name: ClassVar[str] = "fixbn"
    local: ClassVar[frozenset[Kind]] = frozenset()
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"freeze_after": (0, 1)}
    freeze_after: float = 0.5

    def frozen(self, round: int, *, planned_rounds: int) -> bool:
        """Whether statistics stand still in the round that follows `round` done ones.

        >>> [FixBN().frozen(round, planned_rounds=5) for round in range(5)]
        [False, False, False, True, True]
        """
        return round >= self.freeze_after * planned_rounds


@dataclass(frozen=True, kw_only=True)
class FedWon(Algorithm):
    """FedAvg of a network without normalization, whose convolutions have scaled weight standardization.

    The normalizer is `none+sws`; at 32 or more images per step there is adaptive gradient clipping with lambda 0.1, below
    none (the authors use it at batch 32 only). Beyond that it is FedAvg.

    Source: Zhuang & Lyu, FedWon, ICLR 2024, arXiv 2306.05879.
    """

    name: ClassVar[str] = "fedwon"
    local: ClassVar[frozenset[Kind]] = frozenset()
    normalizer: ClassVar[str] = "none+sws"


@dataclass(frozen=True, kw_only=True)
class Standalone(Algorithm):
    """No client shares anything: each has a model of its own, which is evaluated on its own domain."""

    name: ClassVar[str] = "standalone"
    local: ClassVar[frozenset[Kind]] = frozenset(KINDS)


@dataclass(frozen=True, kw_only=True)
class Centralized(Algorithm):
    """All training images in one place, as one client (`batchless.federated.client.participants`): the upper bound.

    A round is `local_epochs` epochs over all of them.
    """

    name: ClassVar[str] = "centralized"
    local: ClassVar[frozenset[Kind]] = frozenset()


ALGORITHMS: tuple[type[Algorithm], ...] = (
    FedAvg,
    FedProx,
    SiloBN,
    FedBN,
    FixBN,
    FedWon,
    Standalone,
    Centralized,
)


def parse_algorithm(name: str, **settings: Any) -> Algorithm:
    """The algorithm of that name; `server` may be a server optimizer, its name, or a mapping with `name` and its settings.

    ValueError for a name or a setting that does not exist, with the nearest one that does, or a value out of range.

    >>> parse_algorithm("fedprox", mu=0.1).mu
    0.1
    >>> parse_algorithm("fedavg", server={"name": "fedavgm", "momentum": 0.5}).server
    FedAvgM(learning_rate=1.0, momentum=0.5)
    """
    if "server" in settings:
        settings["server"] = _server_optimizer(settings["server"])
    algorithm: Algorithm = _made("algorithm", name, {kind.name: kind for kind in ALGORITHMS}, settings)
    return algorithm


def resolve_normalizer(algorithm: Algorithm, normalizer: str | None) -> str:
    """The canonical name of the network's normalizer; None is the algorithm's own: `none+sws` for FedWon, else `bn`.

    ValueError for FedWon with a normalizer that is not `none+sws`, with whatever settings.

    >>> resolve_normalizer(FedWon(), None), resolve_normalizer(FedAvg(), None)
    ('none+sws', 'bn')
    """
    own = FedWon.normalizer if isinstance(algorithm, FedWon) else "bn"
    parsed, needed = parse_normalizer(normalizer or own), parse_normalizer(own)
    if isinstance(algorithm, FedWon) and (type(parsed.act), type(parsed.weight)) != (
        type(needed.act),
        type(needed.weight),
    ):
        raise ValueError(
            f"fedwon is the method without normalization: its normalizer is {own}, got {parsed}; "
            f"to average a network with {parsed} choose fedavg"
        )
    return str(parsed)


def default_clipping(algorithm: Algorithm, *, images_per_step: int) -> float | None:
    """Lambda of adaptive gradient clipping that belongs to the algorithm: FedWon's 0.1 from 32 images per step on.

    >>> default_clipping(FedWon(), images_per_step=32), default_clipping(FedWon(), images_per_step=2)
    (0.1, None)
    """
    return 0.1 if isinstance(algorithm, FedWon) and images_per_step >= 32 else None


def _server_optimizer(given: Any) -> ServerOptimizer:
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        made: ServerOptimizer = given
        return made
    settings = dict(given)
    name = settings.pop("name", Average.name)
    made = _made("server optimizer", name, {kind.name: kind for kind in SERVER_OPTIMIZERS}, settings)
    return made


def _made(what: str, name: str, known: Mapping[str, type[Any]], settings: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: there are {', '.join(known)}{_nearest(name, known)}")
    kind = known[name]
    names = [item.name for item in fields(kind)]
    for setting in settings:
        if setting not in names:
            raise ValueError(
                f"{name} has no setting {setting!r}: it has {', '.join(names) or 'none'}{_nearest(setting, names)}"
            )
    return kind(**settings)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
