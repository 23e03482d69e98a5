"""What makes a federated run what it is."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from batchless.federated.algorithms import (
    Algorithm,
    Unseen,
    Weighting,
    default_clipping,
    parse_algorithm,
    resolve_normalizer,
)
from batchless.federated.client import CLIENT_OPTIMIZER, ClientSettings
from batchless.federated.data_settings import FederatedDataSettings, given
from batchless.federated.privacy import PrivacySettings
from batchless.tasks import DataSettings, TrainConfig
from batchless.tasks.config import made_from
from batchless.train import OptimizerSettings
from batchless.train.device import require_device_name

KIND: Literal["federate"] = "federate"
"""What `config.yaml` says under `kind`, to tell these runs from others."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the server makes of the clients' mean.

    Attributes:
        name: average, fedavgm, fedadam or fedyogi.
        learning_rate: of the others; None: the optimizer's own.
        momentum: of fedavgm; None: 0.9.
        beta1: of fedadam and fedyogi; None: 0.9.
        beta2: of fedadam and fedyogi; None: 0.99.
        tau: of fedadam and fedyogi: adaptivity; None: 0.001.
    """

    name: str = "average"
    learning_rate: float | None = None
    momentum: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    tau: float | None = None


@dataclass(frozen=True, kw_only=True)
class FlowerSettings:
    """Of `engine=flower`, whose clients are elsewhere.

    Attributes:
        nodes: SuperNodes that `batchless federate` starts on this machine, the clients dealt out to them in turn.
        round_timeout: seconds that clients have for a round or an evaluation; who answers later is left out.
        connect_timeout: seconds that the clients of a round have to be connected; who is not is left out.
        server_has_data: whether the server opens `data` too; else `data.domains` and `data.classes` say who the clients are,
            one or more in each domain, and what they tell apart.
    """

    nodes: int = 2
    round_timeout: float = 3600.0
    connect_timeout: float = 120.0
    server_has_data: bool = True

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("round_timeout", 0), ("connect_timeout", 0)):
            if not (value := getattr(self, name)) >= least:
                raise ValueError(f"flower.{name} must be {least} or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class FederateConfig:
    """Everything that makes a federated run what it is; `config.yaml` in its folder.

    Attributes:
        kind: tells this configuration from a training's.
        algorithm: fedavg, fedprox, silobn, fedbn, fixbn, fedwon, standalone or centralized.
        mu: of fedprox; None: 0.01.
        freeze_after: of fixbn: share of the rounds; None: 0.5.
        unseen: of fedbn and silobn: how clients without layers of their own are evaluated; None: reestimate.
        weighting: of clients in the mean: images or equal; always equal with privacy.
        server: what the server makes of the mean.
        model: `digits_cnn_32`, `fedbn_alexnet`, `cifar_resnet<depth>`, `torchvision:<name>`, `timm:<name>`, ...
        normalizer: such as bn, gn+ws; None: the algorithm's own, none+sws for fedwon, else bn.
        rounds: in all.
        clients_per_domain: how many share a domain's images.
        domains_per_client: of how many domains each client has images; with all, clients do not differ by domain.
        fraction: of the clients that take part in a round.
        min_clients: of a round's clients, so many must not fail.
        client_timeout: seconds that a client has for a round, and a domain for its evaluation; a client that takes longer is
            left out and its process replaced, under torchrun (where that is not possible) the run stops. None: no limit.
            Under flower it is flower.round_timeout.
        local_epochs: of each client in a round.
        images_per_forward: the micro-batch; None: images_per_step.
        images_per_step: what one optimizer step of a client sees.
        evaluate_every: rounds from one evaluation to the next; the last round is always evaluated.
        checkpoint_rounds: rounds from one checkpoint to the next; evaluated rounds always have one.
        engine: processes, of this machine or torchrun's; flower, clients elsewhere. The result is the same.
        workers: processes that train clients; None: one for each core. The result is the same.
        threads: of torch, for each client.
        seed: of weights, order, augmentation and of who takes part.
        leave_one_domain_out: instead of one run, one without each domain in turn, in folders within `out`; given again, it goes
            on with what is not done.
        out: the run folder; None: runs/<algorithm>-<model>-<normalizer>-<images_per_step>-seed<seed>.
        weights: checkpoint of the unconverted network to start from; None: random weights.
        device: cpu or cuda.
        tensorboard: whether the metrics are written as TensorBoard events too.
        data: which images, and who has them.
        optimizer: of the clients, made anew each round.
        flower: settings of that engine.
        privacy: differential privacy of clients or of their images.
    """

    kind: Literal["federate"] = KIND
    algorithm: str = "fedavg"
    mu: float | None = None
    freeze_after: float | None = None
    unseen: Unseen | None = None
    weighting: Weighting = "images"
    server: ServerSettings = field(default_factory=ServerSettings)
    model: str = "cifar_resnet8"
    normalizer: str | None = None
    rounds: int = 20
    clients_per_domain: int = 1
    domains_per_client: int = 1
    fraction: float = 1.0
    min_clients: int = 1
    client_timeout: float | None = None
    local_epochs: int = 1
    images_per_forward: int | None = None
    images_per_step: int = 32
    evaluate_every: int = 1
    checkpoint_rounds: int = 1
    engine: Literal["processes", "flower"] = "processes"
    workers: int | None = None
    threads: int = 1
    seed: int = 0
    leave_one_domain_out: bool = False
    out: str | None = None
    weights: str | None = None
    device: str = "cpu"
    tensorboard: bool = True
    data: FederatedDataSettings = field(default_factory=FederatedDataSettings)
    optimizer: OptimizerSettings = CLIENT_OPTIMIZER
    flower: FlowerSettings = field(default_factory=FlowerSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)

    def __post_init__(self) -> None:
        self.resolved_normalizer()
        self.client_settings(device=self.device)
        require_device_name(self.device)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is a share of the clients, above 0 and at most 1; got {self.fraction}")
        for name in (
            "rounds",
            "clients_per_domain",
            "domains_per_client",
            "min_clients",
            "evaluate_every",
            "checkpoint_rounds",
            "workers",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.client_timeout is not None and not self.client_timeout > 0:
            raise ValueError(f"client_timeout is in seconds and must be above 0, got {self.client_timeout}")
        self._check_engine()

    def _check_engine(self) -> None:
        if self.engine not in ("processes", "flower"):
            raise ValueError(f"engine must be processes or flower, got {self.engine!r}")
        if self.engine != "flower":
            return
        if self.domains_per_client != 1:
            raise ValueError(
                f"under flower a client has images of one domain: domains_per_client must be 1, got {self.domains_per_client}"
            )
        if self.client_timeout is not None:
            raise ValueError("client_timeout is of engine=processes: under flower set flower.round_timeout")
        if self.unseen == "mean":
            raise ValueError("unseen=mean needs all clients' layers, which stay with them under flower: use reestimate")
        if self.checkpoint_rounds != 1:
            raise ValueError(
                f"under flower every round is saved: checkpoint_rounds must be 1, got {self.checkpoint_rounds}"
            )
        if self.data.unseen_domains and (self.algorithm == "standalone" or not self.flower.server_has_data):
            raise ValueError(
                "unseen_domains are evaluated by the server, which under flower needs their data (flower.server_has_data) "
                "and a network (not standalone)"
            )
        if self.privacy.level == "sample" and not self.flower.server_has_data:
            raise ValueError(
                "privacy.level=sample accounts by how many images each client has, which a server without data does not know: "
                "set flower.server_has_data, or privacy.level=client"
            )
        if not self.flower.server_has_data and not (self.data.domains and self.data.classes):
            raise ValueError("a server without data has to be told data.domains and data.classes")

    def parsed_algorithm(self) -> Algorithm:
        """The algorithm with its settings."""
        own = {"mu": self.mu, "freeze_after": self.freeze_after, "unseen": self.unseen}
        # How many images a client has is its own secret: a weight by it would have to be clipped and noised too.
        weighting = self.weighting if self.privacy.level == "none" else "equal"
        return parse_algorithm(self.algorithm, server=given(asdict(self.server)), weighting=weighting, **given(own))

    def resolved_normalizer(self) -> str:
        """The canonical name of the network's normalizer."""
        return resolve_normalizer(self.parsed_algorithm(), self.normalizer)

    def client_settings(self, *, device: str) -> ClientSettings:
        """How every client trains, on the device of this process; with the clipping that belongs to the algorithm."""
        optimizer = self.optimizer
        if optimizer.adaptive_clipping is None and optimizer.clip_norm is None:
            clipping = default_clipping(self.parsed_algorithm(), images_per_step=self.images_per_step)
            optimizer = replace(optimizer, adaptive_clipping=clipping)
        return ClientSettings(
            images_per_forward=self.images_per_step if self.images_per_forward is None else self.images_per_forward,
            images_per_step=self.images_per_step,
            local_epochs=self.local_epochs,
            optimizer=optimizer,
            image_size=self.data.image_size,
            augment=self.data.augment(),
            statistics=self.data.statistics(),
            seed=self.seed,
            device=device,
            privacy=self.privacy,
        )

    def network_config(self) -> TrainConfig:
        """A training of the same network: what checkpoints say of it, so that all that takes trained networks takes these."""
        settings = self.client_settings(device=self.device)
        return TrainConfig(
            model=self.model,
            normalizer=self.resolved_normalizer(),
            images_per_forward=settings.images_per_forward,
            images_per_step=settings.images_per_step,
            seed=self.seed,
            weights=self.weights,
            threads=self.threads,
            data=DataSettings(root=self.data.root, image_size=self.data.image_size, crop_padding=0),
            optimizer=settings.optimizer,
        )

    def worker_count(self, clients: int) -> int:
        """How many processes train: no more than clients in a round."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores if self.workers is None else self.workers, clients)

    def folder(self) -> Path:
        """Where the run is written."""
        if self.out is not None:
            return Path(self.out)
        model = self.model.replace(":", "-")
        name = f"{self.algorithm}-{model}-{self.resolved_normalizer()}-{self.images_per_step}-seed{self.seed}"
        return Path("runs") / name

    def plain(self) -> dict[str, Any]:
        """As `config.yaml` holds it: with its kind, and the normalizer's name in its canonical form."""
        return asdict(self) | {"normalizer": self.resolved_normalizer()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], *, source: str | Path) -> "FederateConfig":
        """The configuration that `plain()` was of; settings that came later have their defaults.

        ValueError naming `source` if a setting is unknown or wrong, or if it is of another kind of run.
        """
        groups: dict[str, Any] = {
            "data": FederatedDataSettings,
            "optimizer": OptimizerSettings,
            "server": ServerSettings,
            "flower": FlowerSettings,
            "privacy": PrivacySettings,
        }
        values = dict(plain)
        if values.pop("kind", None) != KIND:
            raise ValueError(f"{source} is of no federated run: `batchless train --resume` goes on with a training")
        try:
            made: FederateConfig = made_from(
                cls,
                {name: made_from(groups[name], value) if name in groups else value for name, value in values.items()},
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} holds no configuration of a federated run: {error}") from error
        return made
