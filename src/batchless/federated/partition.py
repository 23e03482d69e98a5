"""Who holds which images: from domains of images to clients, with the record that says so."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from batchless.data import ImageDataset, PooledImages, Subset
from batchless.federated.partitioners import IID, Partitioner, partitioner_name


@dataclass(frozen=True, kw_only=True, eq=False)
class Client:
    """One participant: some images of one domain, or of several.

    Attributes:
        id: its place in the partition, from 0 on; the order of everything.
        domain: where its images come from; of several domains, their names with + between.
        train: the images it trains on, one or more.
        validation: the images it sets aside; None: it sets none aside.
        shares: of a client with several domains: what it sets aside of each; else empty.
    """

    id: int
    domain: str
    train: ImageDataset
    validation: ImageDataset | None = None
    shares: Mapping[str, ImageDataset | None] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """All of which it has images."""
        return tuple(self.shares) or (self.domain,)

    def validation_of(self, domain: str) -> ImageDataset | None:
        """What it sets aside of one of its domains; of another one, all it sets aside."""
        return self.shares.get(domain, self.validation)


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """All clients and what they are tested on.

    Attributes:
        clients: by id.
        tests: the test images of every domain of `domains`.
        domains: all of them, also those without a client (`unseen` in the record).
        classes: the same in all domains.
        record: JSON-ready: `partitioner` (its `name` and settings), `seed`, `classes`, `domains`, `unseen`; `clients`, a
            list of `id`, `domain`, `train` and `validation` (indices into the domain's training images; of several domains
            these are lists by domain), `counts` (training images of each class) and `validation_counts`; and `tests`, for each
            domain `images` and `counts`.
    """

    clients: tuple[Client, ...]
    tests: Mapping[str, ImageDataset]
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    record: dict[str, Any]


def partition(
    train: Mapping[str, ImageDataset],
    tests: Mapping[str, ImageDataset],
    *,
    seed: int,
    partitioner: Partitioner | None = None,
    clients_per_domain: int = 1,
    domains_per_client: int = 1,
    images_per_client: int | None = None,
    validation_images: int = 0,
    validation_share: float = 0.0,
    unseen: Collection[str] = (),
) -> Federation:
    """Deal out the training images of each domain to its clients; no image twice.

    Of the images that the partitioner gives a client, in that order, the last ones validate and the first ones train.

    Args:
        train: the training images of each domain; clients are numbered domain by domain, in this order.
        tests: the test images of the same domains.
        seed: with the domain's name, of all random numbers.
        partitioner: the rule within a domain; None: `IID()`.
        clients_per_domain: 1 is the partition by domain.
        domains_per_client: k; each of a domain's clients also has images of the k - 1 domains that follow it (after the last
            comes the first), so that a domain is shared by k times `clients_per_domain` clients. 1: images of one domain only;
            the number of domains: every client has images of all. The next two limits are shared between its domains.
        images_per_client: train on so many at most; the others between them and the validation images are left out.
        validation_images: so many of each client's images validate.
        validation_share: this share of each client's images validates; not both.
        unseen: domains that have no client and are only tested on, as for leave-one-domain-out.

    ValueError if domains or their classes do not agree, or if there are too few images.
    """
    classes = _common_classes(train, tests)
    _check_settings(clients_per_domain, images_per_client, validation_images, validation_share)
    for name in sorted(set(unseen) - set(train)):
        raise ValueError(f"unseen domain {name!r}: there is none of that name, there are {', '.join(train)}")
    rule = IID() if partitioner is None else partitioner
    clients: list[Client] = []
    rows: list[dict[str, Any]] = []
    seen = [domain for domain in train if domain not in unseen]
    if not seen:
        raise ValueError(f"unseen={sorted(unseen)}: no domain is left to train on, there are {', '.join(train)}")
    if not 1 <= domains_per_client <= len(seen):
        raise ValueError(f"domains_per_client={domains_per_client}: give 1 to {len(seen)}, the domains with clients")
    labels = {domain: [train[domain].label(index) for index in range(len(train[domain]))] for domain in seen}
    number = clients_per_domain * domains_per_client
    parts = {domain: _split(labels[domain], number, rule, domain=domain, seed=seed) for domain in seen}
    for first in range(len(seen)):
        for turn in range(clients_per_domain):
            held = [seen[(first + step) % len(seen)] for step in range(domains_per_client)]
            whole = {domain: parts[domain][turn * domains_per_client + step] for step, domain in enumerate(held)}
            shares = _used_and_kept(whole, images_per_client, validation_images, validation_share)
            if not any(used for used, _ in shares.values()):
                size = sum(map(len, whole.values()))
                held_out = validation_images or sum(len(kept) for _, kept in shares.values())
                raise ValueError(
                    f"domain {seen[first]!r}: client {len(clients)} has {size} images, {held_out} of them for validation,"
                    " and none left to train on: fewer clients per domain, or fewer validation images"
                )
            clients.append(_client(len(clients), train, shares))
            rows.append(_row(len(rows), labels, shares, len(classes)))
    record = {
        "partitioner": {"name": partitioner_name(rule), **asdict(rule)},
        "seed": seed,
        "classes": list(classes),
        "domains": list(train),
        "unseen": [domain for domain in train if domain in unseen],
        "clients": rows,
        "tests": {domain: _test_row(tests[domain], len(classes)) for domain in train},
    }
    return Federation(
        clients=tuple(clients),
        tests={domain: tests[domain] for domain in train},
        domains=tuple(train),
        classes=classes,
        record=record,
    )


def _split(labels: Sequence[int], clients: int, partitioner: Partitioner, *, domain: str, seed: int) -> list[list[int]]:
    """The indices of each of the domain's clients, none without images."""
    if len(labels) < clients:
        raise ValueError(
            f"domain {domain!r} has {len(labels)} training images for {clients} clients: give fewer clients per domain"
        )
    # The domain's name, not its position: leaving a domain out changes nothing in the others.
    rng = np.random.default_rng(list(f"partition/{seed}/{domain}".encode()))
    try:
        parts = partitioner.split(labels, clients, rng=rng)
    except ValueError as error:
        raise ValueError(f"domain {domain!r}: {error}") from error
    assert sum(map(len, parts)) == len({index for part in parts for index in part}) == len(labels)
    return parts


def _used_and_kept(
    whole: Mapping[str, list[int]], images: int | None, validation_images: int, validation_share: float
) -> dict[str, tuple[list[int], list[int]]]:
    """A client's images of each domain: the first ones train, the last ones validate."""
    shares = {}
    for step, (domain, part) in enumerate(whole.items()):
        held_out = _portion(validation_images, step, len(whole)) or round(validation_share * len(part))
        begin = max(len(part) - held_out, 0)
        limit = None if images is None else _portion(images, step, len(whole))
        shares[domain] = part[:begin][:limit], part[begin:]
    return shares


def _portion(whole: int, step: int, of: int) -> int:
    """The `step`-th of `of` portions of `whole`, which differ by one at most.

    >>> [_portion(8, step, 3) for step in range(3)]
    [2, 3, 3]
    """
    return whole * (step + 1) // of - whole * step // of


def _client(
    number: int, train: Mapping[str, ImageDataset], shares: Mapping[str, tuple[list[int], list[int]]]
) -> Client:
    used = [Subset(dataset=train[domain], indices=tuple(indices)) for domain, (indices, _) in shares.items()]
    kept = {
        domain: Subset(dataset=train[domain], indices=tuple(indices)) if indices else None
        for domain, (_, indices) in shares.items()
    }
    there = tuple(part for part in kept.values() if part is not None)
    several = len(shares) > 1
    return Client(
        id=number,
        domain="+".join(shares),
        train=PooledImages(parts=tuple(used)) if several else used[0],
        validation=(PooledImages(parts=there) if several else there[0]) if there else None,
        shares=kept if several else {},
    )


def _row(
    number: int,
    labels: Mapping[str, Sequence[int]],
    shares: Mapping[str, tuple[list[int], list[int]]],
    classes: int,
) -> dict[str, Any]:
    """The client's part of the record."""
    used, kept = ({domain: share[place] for domain, share in shares.items()} for place in (0, 1))
    several = len(shares) > 1
    return {
        "id": number,
        "domain": "+".join(shares),
        "train": used if several else next(iter(used.values())),
        "validation": kept if several else next(iter(kept.values())),
        "counts": _counts([labels[domain][index] for domain in used for index in used[domain]], classes),
        "validation_counts": _counts([labels[domain][index] for domain in kept for index in kept[domain]], classes),
    }


def _counts(labels: Sequence[int], classes: int) -> list[int]:
    return [int(count) for count in np.bincount(np.asarray(labels, dtype=int), minlength=classes)]


def _test_row(images: ImageDataset, classes: int) -> dict[str, Any]:
    labels = [images.label(index) for index in range(len(images))]
    return {"images": len(labels), "counts": _counts(labels, classes)}


def _common_classes(train: Mapping[str, ImageDataset], tests: Mapping[str, ImageDataset]) -> tuple[str, ...]:
    if not train:
        raise ValueError("no domain to partition: give the training images of one or more domains")
    for domain in sorted(set(train) ^ set(tests)):
        present, absent = ("training", "test") if domain in train else ("test", "training")
        raise ValueError(f"domain {domain!r} has {present} images but no {absent} images: every domain needs both")
    first, *_ = train
    classes = train[first].classes
    for split, domains in (("training", train), ("test", tests)):
        for domain, images in domains.items():
            if images.classes != classes:
                different = sorted(set(images.classes) ^ set(classes))
                what = f"they differ in {', '.join(different[:3])}" if different else "in another order"
                raise ValueError(
                    f"domain {domain!r}: its {split} images have {len(images.classes)} classes, domain {first!r} has"
                    f" {len(classes)} ({what}); all domains of a federation need the same classes"
                )
    return classes


def _check_settings(clients: int, images: int | None, validation_images: int, validation_share: float) -> None:
    if clients < 1:
        raise ValueError(f"clients_per_domain={clients}: give 1 or more")
    if images is not None and images < 1:
        raise ValueError(f"images_per_client={images}: give 1 or more, or None for all")
    if validation_images < 0:
        raise ValueError(f"validation_images={validation_images}: give 0 or more")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share={validation_share}: give a share from 0 to below 1")
    if validation_images and validation_share:
        raise ValueError(
            f"validation_images={validation_images} and validation_share={validation_share}: give one of them"
        )
