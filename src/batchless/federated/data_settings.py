"""Which domains a federated run is over, and how their images are dealt out to clients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batchless.data import IMAGENET_STATISTICS, Augment, ChannelStatistics
from batchless.federated.partitioners import Partitioner, parse_partitioner

_STATISTICS = {
    "half": ChannelStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "imagenet": IMAGENET_STATISTICS,
    "none": ChannelStatistics(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}
_VALIDATION_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class FederatedDataSettings:
    """Which images, who has them, and what happens to them.

    Attributes:
        root: folder of domains in any known layout; None: the embedded digits in five domains.
        domains: these only; None: all.
        classes: these only; None: all.
        unseen_domains: that have no client and are only tested on.
        partitioner: how a domain's images are dealt out to its clients: iid, slices, dirichlet or shards.
        alpha: of dirichlet: near 0 each client has few classes; None: 0.5.
        minimum: of dirichlet: fewest images of a client; None: 10.
        shards_per_client: of shards; None: 2.
        images_per_client: that it trains on, at most; None: all.
        validation_images: of each client's images, set aside to choose the round; None: a share of them.
        validation_share: that share; None: 0.1, unless validation_images is given.
        test_share: of a domain's images, where the data has no test images of its own.
        seed: of who has which images; not the run's, so that runs with other seeds train on the same clients.
        image_size: the square that the network sees, in pixels.
        normalize: of pixels from 0 to 1: half takes 0.5 off and doubles, imagenet uses its statistics, none nothing.
        crop_padding: random crops after padding by so many pixels.
        random_resized_crop: random parts resized (ImageNet's way) instead.
        flip: mirror images at random; not for digits.
        rotation: turn by up to so many degrees either way, at random; FedBN has 30 for photographs.
        rand_augment: so many operations of RandAugment on each training image; 0: none.
        color_jitter: how far brightness, contrast and saturation change; 0: not.
    """

    root: str | None = None
    domains: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    unseen_domains: tuple[str, ...] = ()
    partitioner: Literal["iid", "slices", "dirichlet", "shards"] = "iid"
    alpha: float | None = None
    minimum: int | None = None
    shards_per_client: int | None = None
    images_per_client: int | None = None
    validation_images: int | None = None
    validation_share: float | None = None
    test_share: float = 0.2
    seed: int = 0
    image_size: int = 32
    normalize: Literal["half", "imagenet", "none"] = "half"
    crop_padding: int = 0
    random_resized_crop: bool = False
    flip: bool = False
    rotation: float = 0.0
    rand_augment: int = 0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (
            ("image_size", 1),
            ("images_per_client", 1),
            ("validation_images", 0),
            ("seed", 0),
            ("crop_padding", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be {least} or more, got {value}")
        if not 0 < self.test_share < 1:
            raise ValueError(f"data.test_share must be above 0 and below 1, got {self.test_share}")
        if not 0 <= self.held_out()["validation_share"] < 1:
            raise ValueError(f"data.validation_share must be from 0 to below 1, got {self.validation_share}")
        if self.validation_images and self.validation_share:
            raise ValueError("data.validation_images and data.validation_share are alternatives: set one of them")
        if self.normalize not in _STATISTICS:
            raise ValueError(f"data.normalize must be {', '.join(_STATISTICS)}; got {self.normalize!r}")
        try:
            self.rule()
            self.augment()
        except ValueError as error:
            raise ValueError(f"data: {error}") from error

    def rule(self) -> Partitioner:
        """How a domain's images are dealt out."""
        settings = {"alpha": self.alpha, "minimum": self.minimum, "per_client": self.shards_per_client}
        return parse_partitioner(self.partitioner, **given(settings))

    def held_out(self) -> dict[str, Any]:
        """The validation settings as `partition` takes them."""
        share = self.validation_share
        if share is None:
            share = _VALIDATION_SHARE if self.validation_images is None else 0.0
        return {"validation_images": self.validation_images or 0, "validation_share": share}

    def augment(self) -> Augment | None:
        """What happens at random to a training image; None: nothing."""
        augment = Augment(
            crop_padding=self.crop_padding,
            random_resized_crop=self.random_resized_crop,
            flip=self.flip,
            rotation=self.rotation,
            rand_augment=self.rand_augment,
            color_jitter=self.color_jitter,
        )
        return None if augment == Augment(crop_padding=0, random_resized_crop=False, flip=False) else augment

    def statistics(self) -> ChannelStatistics:
        """By which images are normalized: nothing that clients would have to tell."""
        return _STATISTICS[self.normalize]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of `values` is set."""
    return {name: value for name, value in values.items() if value is not None}
