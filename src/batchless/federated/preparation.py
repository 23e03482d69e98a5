"""From a resolved configuration to all that a federated run needs, before anything is written."""

from dataclasses import dataclass
from typing import Any

import torch

from batchless.data import open_domains
from batchless.data.memory import TensorImages
from batchless.federated.accounting import require_opacus
from batchless.federated.config import FederateConfig
from batchless.federated.engine import Workplace
from batchless.federated.partition import Client, Federation, partition
from batchless.federated.privacy import explain_privacy, require_private
from batchless.federated.sample_privacy import per_image_gradients
from batchless.federated.sampling import sampled_clients
from batchless.federated.server import ServerState, initial_state
from batchless.federated.sharing import explain
from batchless.models import build_model
from batchless.models.weights import load_weights
from batchless.runs import RunFolder
from batchless.runs.atomic import write_text
from batchless.runs.folder import strict_json
from batchless.surgery import ConversionReport
from batchless.tasks import Classify
from batchless.tasks.experiment import require_runs
from batchless.tasks.trained import build_converted
from batchless.train.device import require_device

PARTITION, SHARING = "partition.json", "sharing.txt"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin.

    Attributes:
        config: what was asked for.
        workplace: of this process.
        state: before the first round.
        conversion: what the normalizer's name did to the network.
        notes: what of the pretrained weights was taken.
    """

    config: FederateConfig
    workplace: Workplace
    state: ServerState
    conversion: ConversionReport
    notes: tuple[str, ...]

    def clients_per_round(self) -> int:
        """How many take part in each; with privacy of clients, how many are expected (rounded, at least one)."""
        number = len(self.workplace.clients())
        return len(sampled_clients(number, fraction=self.config.fraction, seed=0, round=1))

    def explanation(self) -> str:
        """Which network, how many clients, which tensors are shared, and which stay with the clients."""
        privacy = explain_privacy(
            self.config.privacy, clients=len(self.workplace.clients()), fraction=self.config.fraction
        )
        explained = (
            f"{self.config.model} with {self.conversion.normalizer}: {len(self.conversion.replaced)} layers replaced\n"
            f"{len(self.workplace.clients())} clients, {self.clients_per_round()} in a round\n"
            f"{explain(self.workplace.algorithm, self.workplace.model)}"
        )
        return f"{explained}\n{privacy}" if privacy else explained


def open_federation(config: FederateConfig) -> Federation:
    """The clients and test images of a run; ValueError if the data is not there, or too little for so many clients."""
    data = config.data
    if config.engine == "flower" and not config.flower.server_has_data:
        return _told_federation(config)
    train, tests = (
        open_domains(
            data.root,
            split,
            domains=data.domains,
            classes=data.classes,
            test_share=data.test_share,
            seed=data.seed,
        )
        for split in ("train", "test")
    )
    return partition(
        train,
        tests,
        seed=data.seed,
        partitioner=data.rule(),
        clients_per_domain=config.clients_per_domain,
        domains_per_client=config.domains_per_client,
        images_per_client=data.images_per_client,
        unseen=data.unseen_domains,
        **data.held_out(),
    )


def _told_federation(config: FederateConfig) -> Federation:
    """As the server knows it that has no image: who the clients are, and what the classes are called."""
    domains, classes = config.data.domains or (), config.data.classes or ()
    owners = [domain for domain in domains for _ in range(config.clients_per_domain)]
    empty = TensorImages(images=torch.zeros(0, 3, 1, 1, dtype=torch.uint8), labels=(), classes=classes, origins=())
    none = [0] * len(classes)
    nothing: dict[str, Any] = {"train": [], "validation": [], "counts": none, "validation_counts": none}
    return Federation(
        clients=tuple(Client(id=i, domain=domain, train=empty) for i, domain in enumerate(owners)),
        tests=dict.fromkeys(domains, empty),
        domains=domains,
        classes=classes,
        record={
            "partitioner": {"name": config.data.partitioner},
            "seed": config.data.seed,
            "classes": list(classes),
            "domains": list(domains),
            "unseen": [],
            "clients": [{"id": i, "domain": domain} | nothing for i, domain in enumerate(owners)],
            "tests": {domain: {"images": 0, "counts": none} for domain in domains},
        },
    )


def prepare(config: FederateConfig, *, device: str) -> Prepared:
    """Everything that can be wrong, before anything is written; the same on all processes.

    Raises:
        ValueError: data, model or settings that cannot be used.
    """
    require_device(device)
    if config.privacy.level != "none":
        require_opacus()
    prepared = prepare_for(config, open_federation(config), device=device)
    if config.min_clients > (count := prepared.clients_per_round()):
        raise ValueError(
            f"min_clients={config.min_clients}, but {count} clients take part in a round: lower it, or raise fraction"
        )
    return prepared


def prepare_for(config: FederateConfig, federation: Federation, *, device: str) -> Prepared:
    """The network and all that belongs to it, for these clients; ValueError if it cannot be used."""
    algorithm, network = config.parsed_algorithm(), config.network_config()
    torch.manual_seed(config.seed)
    model = build_model(config.model, num_classes=len(federation.classes))
    notes = () if config.weights is None else load_weights(model, config.weights)
    require_runs(model, torch.zeros(2, 3, config.data.image_size, config.data.image_size), network)
    model, conversion = build_converted(network, model)
    if not conversion.replaced and conversion.normalizer != "bn":
        raise ValueError(
            f"{config.model} has nothing that {conversion.normalizer} replaces: choose a network with BatchNorm, or bn"
        )
    require_private(config.privacy, algorithm, model)
    if config.privacy.level == "sample":
        require_opacus()
        with per_image_gradients(model):  # says what it cannot do
            pass
    return Prepared(
        config=config,
        workplace=Workplace(
            model=model.to(device),
            federation=federation,
            algorithm=algorithm,
            task=Classify(),
            settings=config.client_settings(device=device),
        ),
        state=initial_state(model, algorithm, config.rounds),
        conversion=conversion,
        notes=notes,
    )


def new_folder(prepared: Prepared) -> RunFolder:
    """The run's folder, with all that is known before the first round."""
    config = prepared.config
    run = RunFolder.create(config.folder(), config=config.plain(), seed=config.seed, tensorboard=config.tensorboard)
    try:
        notes = "".join(f"{note}\n" for note in prepared.notes)
        write_text(run.path / "conversion.txt", f"{notes}{prepared.conversion}\n")
        records = prepared.conversion.records() | {"weights": list(prepared.notes)}
        write_text(run.path / "conversion.json", strict_json(records, indent=1))
        write_text(run.path / SHARING, f"{prepared.explanation()}\n")
        write_text(run.path / PARTITION, strict_json(prepared.workplace.federation.record))
    except BaseException:
        run.release()
        raise
    return run
