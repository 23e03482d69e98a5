"""How good a round's models are, domain by domain."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchless.data import ImageDataset, Subset
from batchless.federated.algorithms import Algorithm, FedBN, SiloBN, Standalone
from batchless.federated.client import ClientSettings, load_state
from batchless.federated.partition import Client, Federation
from batchless.federated.server import ServerState
from batchless.federated.sharing import tensor_kinds
from batchless.surgery import recalibrate
from batchless.tasks.classify import Batch, ImageData
from batchless.train import Metric, Task, evaluate

REESTIMATION_IMAGES = 128
"""How many images, evenly spread over a dataset, statistics are estimated anew on."""


def mean_over_clients(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over those that have it; `unseen` is counted.

    >>> mean_over_clients([{"loss": 1.0, "unseen": 1.0}, {"loss": 2.0}])
    {'loss': 1.5, 'unseen': 1.0}
    """
    names = {name: None for figures in found for name in figures if name != "unseen"}
    means = {name: _mean([figures[name] for figures in found if name in figures]) for name in names}
    unseen = sum(figures.get("unseen", 0.0) for figures in found)
    return means | ({"unseen": unseen} if unseen else {})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The task's figures on test images (`accuracy`, `loss`) and on validation images (`validation_..`) after a round.

    - Nothing of this network stays with the clients: the global model on all test images, and on the domain's validation
      images together.
    - Else each of the domain's m clients has its own model and every m-th test image, the k-th client from the k-th on;
      the figures are the means over clients. A client that has not trained yet is evaluated as `unseen` says.
    - A domain without clients then: one model made as `unseen` says, from the domain's test images without their labels.
      `standalone` has none to make: the models of all clients, a share of the images each.

    `unseen` counts the models that were made so, where there are any.

    Attributes:
        model: the one network of this process, on `settings.device`; its tensors are overwritten.
        state: after the round.
        locals: by client, the tensors that stay with it; those that never trained are missing.
        federation: whose tests and clients.
        algorithm: what stays with the clients.
        task: whose figures.
        settings: size, normalization and device of the images.
    """

    model: nn.Module
    state: ServerState
    locals: Mapping[int, Mapping[str, Tensor]]
    federation: Federation
    algorithm: Algorithm
    task: Task[Batch]
    settings: ClientSettings

    def __post_init__(self) -> None:
        load_state(self.model, self.state, None)

    def of_domains(self, domains: Collection[str]) -> dict[str, dict[str, float]]:
        """By domain its figures, of some domains."""
        return {domain: self.of_domain(domain) for domain in self.federation.domains if domain in domains}

    def of_domain(self, domain: str) -> dict[str, float]:
        """The figures of a domain."""
        test = self.federation.tests[domain]
        own = [client for client in self.federation.clients if domain in client.domains]
        if not self.state.initial:
            figures = self._figures([test])
            return figures | _validation(self._figures(client.validation_of(domain) for client in own))
        if not own and isinstance(self.algorithm, Standalone):
            return self._of_clients(self.federation.clients, domain)
        if not own:
            self._make_unseen(test)
            return self._figures([test]) | {"unseen": 1.0}
        return self._of_clients(own, domain)

    def _of_clients(self, clients: Sequence[Client], domain: str) -> dict[str, float]:
        """The mean over the clients' own models; a client without a test image counts where it has figures."""
        return mean_over_clients([self._of_share(client, domain, clients) for client in clients])

    def of_client(self, client: Client) -> dict[str, float]:
        """What one client brings to its domain's means, where layers stay with the clients; `unseen`: it has none yet."""
        own = [each for each in self.federation.clients if each.domain == client.domain]
        return self._of_share(client, client.domain, own)

    def _of_share(self, client: Client, domain: str, among: Sequence[Client]) -> dict[str, float]:
        """Of the client's own model, on its share of the domain's test images."""
        test = self.federation.tests[domain]
        position = [each.id for each in among].index(client.id)
        share = Subset(dataset=test, indices=tuple(range(position, len(test), len(among))))
        seen = client.id in self.locals or isinstance(self.algorithm, Standalone)
        if seen:
            self._load_local(self.locals.get(client.id, self.state.initial))
        else:
            self._make_unseen(client.train)
        figures = self._figures([share]) | _validation(self._figures([client.validation_of(domain)]))
        return figures if seen else figures | {"unseen": 1.0}

    def _make_unseen(self, images: ImageDataset) -> None:
        assert isinstance(self.algorithm, FedBN | SiloBN)
        if self.algorithm.unseen == "mean" and self.locals:
            self._load_local(mean_of(self.locals))
            return
        self._load_local(self.state.initial)
        if "statistic" in tensor_kinds(self.model).values():
            count = min(len(images), REESTIMATION_IMAGES)
            spread = Subset(dataset=images, indices=tuple(len(images) * i // count for i in range(count)))
            recalibrate(self.model, (pictures for pictures, _ in self._data(spread).test(range(count))))

    @torch.no_grad()
    def _load_local(self, local: Mapping[str, Tensor]) -> None:
        state = self.model.state_dict()
        for name, value in local.items():
            state[name].copy_(value)

    def _figures(self, datasets: Iterable[ImageDataset | None]) -> dict[str, float]:
        """Over the images of all datasets together; nothing where there is none."""
        whole: Metric[Any] | None = None
        for images in datasets:
            if images is not None and len(images):
                metric = evaluate(self.model, self.task, self._data(images), self.settings.device)
                if whole is None:
                    whole = metric
                else:
                    whole.merge(metric)
        return {} if whole is None else dict(whole.compute())

    def _data(self, images: ImageDataset) -> ImageData:
        return self.settings.data(images, seed=self.settings.seed)


def mean_of(locals: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the clients' local tensors, in float64 and in the order of their ids; counters: the maximum.

    >>> mean_of({3: {"gain": torch.tensor([1.0])}, 1: {"gain": torch.tensor([2.0])}})
    {'gain': tensor([1.5000])}
    """
    ids = sorted(locals)
    mean: dict[str, Tensor] = {}
    for name, first in locals[ids[0]].items():
        values = [locals[client][name] for client in ids]
        if first.is_floating_point():
            mean[name] = torch.stack([value.double() for value in values]).mean(0).to(first.dtype)
        else:
            mean[name] = torch.stack(values).amax(0)
    return mean


def _validation(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"validation_{name}": value for name, value in figures.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
