"""How the images of one domain are dealt out to its clients: five rules, each a frozen dataclass."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Consecutive parts of equal length (or one longer) in the dataset's own order, as FedBN cuts Digits-Five.

    For lists that are shuffled already; of images sorted by class, a client would get a few classes only.
    """

    def split(self, labels: Sequence[int], clients: int, *, rng: np.random.Generator) -> list[list[int]]:
        """The indices of each client's images."""
        return [part.tolist() for part in np.array_split(np.arange(len(labels)), clients)]


@dataclass(frozen=True, kw_only=True)
class IID:
    """Parts of equal length (or one longer) of a random order: every client has the domain's mixture of classes."""

    def split(self, labels: Sequence[int], clients: int, *, rng: np.random.Generator) -> list[list[int]]:
        """The indices of each client's images."""
        return [part.tolist() for part in np.array_split(rng.permutation(len(labels)), clients)]


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Label skew (Yurochkin et al., arXiv 1905.12022): the images of each class are dealt out by shares `~ Dir(alpha)`.

    Clients differ in their mixture of classes and in size. The whole draw is repeated until every client has `minimum`
    images, up to 1000 times.

    Attributes:
        alpha: above 0; towards 0 a class belongs to one client, towards infinity the parts become IID.
        minimum: the fewest images a client may have, 1 or more.
    """

    alpha: float = 0.5
    minimum: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"dirichlet: alpha={self.alpha}: give a number above 0, such as 0.1 (skewed) or 1 (mild)")
        if self.minimum < 1:
            raise ValueError(f"dirichlet: minimum={self.minimum}: a client needs at least 1 image")

    def split(self, labels: Sequence[int], clients: int, *, rng: np.random.Generator) -> list[list[int]]:
        """The indices of each client's images, in random order; ValueError if no draw gives everyone `minimum` images."""
        if self.minimum * clients > len(labels):
            raise ValueError(
                f"dirichlet: {clients} clients with minimum={self.minimum} images each need {self.minimum * clients},"
                f" there are {len(labels)}: fewer clients, or a smaller minimum"
            )
        values = np.asarray(labels)
        members = [rng.permutation(np.flatnonzero(values == label)) for label in np.unique(values)]
        best = 0
        for _ in range(_TRIES):
            # Where each class is cut: [classes, clients - 1].
            shares = rng.dirichlet(np.full(clients, self.alpha), size=len(members)).cumsum(axis=1)[:, :-1]
            cuts = [(share * len(member)).astype(int) for share, member in zip(shares, members, strict=True)]
            sizes = sum(np.diff(cut, prepend=0, append=len(member)) for cut, member in zip(cuts, members, strict=True))
            best = max(best, int(np.min(sizes)))
            if best >= self.minimum:
                parts = [np.split(member, cut) for member, cut in zip(members, cuts, strict=True)]
                return [_shuffled(np.concatenate([part[client] for part in parts]), rng) for client in range(clients)]
        raise ValueError(
            f"dirichlet: in {_TRIES} draws with alpha={self.alpha} for {clients} clients the smallest client had at most"
            f" {best} of minimum={self.minimum} images: a larger alpha, fewer clients or a smaller minimum"
        )


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Label skew (McMahan et al., arXiv 1602.05629): images sorted by class are cut into shards, dealt out at random.

    Attributes:
        per_client: shards of each client, 1 or more; with 2, as in the paper, most clients have two classes.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        if self.per_client < 1:
            raise ValueError(f"shards: per_client={self.per_client}: a client needs at least 1 shard")

    def split(self, labels: Sequence[int], clients: int, *, rng: np.random.Generator) -> list[list[int]]:
        """The indices of each client's images, in random order; ValueError if there are more shards than images."""
        number = clients * self.per_client
        if number > len(labels):
            raise ValueError(
                f"shards: {clients} clients with per_client={self.per_client} need {number} shards of at least 1 image,"
                f" there are {len(labels)} images: fewer clients, or fewer shards per client"
            )
        order = rng.permutation(len(labels))  # which images of a class share a shard is random, too
        shards = np.array_split(order[np.argsort(np.asarray(labels)[order], kind="stable")], number)
        dealt = rng.permutation(number).reshape(clients, self.per_client)
        return [_shuffled(np.concatenate([shards[shard] for shard in hand]), rng) for hand in dealt]


Partitioner = Slices | IID | Dirichlet | Shards
PARTITIONERS: dict[str, type[Partitioner]] = {"iid": IID, "slices": Slices, "dirichlet": Dirichlet, "shards": Shards}


def parse_partitioner(name: str, **settings: Any) -> Partitioner:
    """The partitioner of that name; ValueError naming the nearest one, or the settings there are.

    >>> parse_partitioner("dirichlet", alpha=0.1)
    Dirichlet(alpha=0.1, minimum=10)
    """
    if name not in PARTITIONERS:
        near = get_close_matches(name, PARTITIONERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"partitioner={name!r}: {hint}there are {', '.join(PARTITIONERS)}")
    kind = PARTITIONERS[name]
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(settings) - set(known)):
        there = f"its settings are {', '.join(known)}" if known else "it has no settings"
        raise ValueError(f"partitioner {name} has no setting {unknown[0]!r}: {there}")
    return kind(**settings)


def partitioner_name(partitioner: Partitioner) -> str:
    """The name by which `parse_partitioner` makes it."""
    return next(name for name, kind in PARTITIONERS.items() if type(partitioner) is kind)


def _shuffled(indices: NDArray[np.intp], rng: np.random.Generator) -> list[int]:
    return [int(index) for index in rng.permutation(indices)]
