"""All rounds of a run: train, sum, save, evaluate, and tell about it."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from batchless.federated.accounting import epsilon, steps_of
from batchless.federated.algorithms import Centralized
from batchless.federated.client_privacy import ClientNoise
from batchless.federated.config import FederateConfig
from batchless.federated.engine import Engine, Figures, Workplace, run_round
from batchless.federated.privacy import sampled_by_coins
from batchless.federated.sampling import sampled_clients
from batchless.federated.server import ServerState
from batchless.federated.state import Progress, checkpoint_state
from batchless.federated.summing import RoundSum
from batchless.runs import RunFolder
from batchless.runs.memory import peak_memory_bytes
from batchless.train.interrupt import ShouldStop, TrainingStoppedError, never_stop

MEAN = "mean"
"""The name, in place of a domain's, of the mean over the domains that have clients."""


@dataclass(frozen=True, kw_only=True)
class RoundProgress:
    """What is shown while a run goes on.

    Attributes:
        round: that is being done; after the last one, that one.
        rounds: in all.
        clients: of this round that are done.
        clients_in_round: how many take part in it.
        images: training images seen in the rounds done.
        figures: the latest `loss`, means over the domains as `test_<name>`, and `left_out` in all.
        domains: the latest figures of each domain.
    """

    round: int
    rounds: int
    clients: int
    clients_in_round: int
    images: int
    figures: Mapping[str, float]
    domains: Figures


OnRound = Callable[[RoundProgress], None]
"""Called after each client, each round and each evaluation."""


def show_nothing(progress: RoundProgress) -> None:
    """Show nothing."""


@dataclass(kw_only=True)
class Rounds:
    """A run in progress.

    Attributes:
        engine: where clients train.
        workplace: of this process.
        config: how many rounds, how often evaluated and saved.
        state: of the server.
        locals: by client, what stays with it.
        progress: how far it is.
        run: the run folder.
        about: kept in every checkpoint, so that it can be used without the run folder.
        on_round: shows the progress.
        should_stop: asked after every client.
        stops_within_rounds: whether a round can be left; else it is asked after each round.
    """

    engine: Engine
    workplace: Workplace
    config: FederateConfig
    state: ServerState
    locals: dict[int, Mapping[str, Tensor]]
    progress: Progress
    run: RunFolder
    about: Mapping[str, Any]
    on_round: OnRound
    should_stop: ShouldStop
    stops_within_rounds: bool = True
    figures: dict[str, float] = field(default_factory=dict)
    domains: Figures = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.number = len(self.workplace.clients())
        self.in_round = len(self._chosen(1))
        self.saved = self.state.round
        self.noise: ClientNoise | None = None
        if config.privacy.level == "client":
            expected = config.fraction * self.number
            self.noise = ClientNoise(privacy=config.privacy, expected_clients=expected, seed=config.seed)
        done = range(1, self.state.round + 1) if config.privacy.level == "sample" else ()
        self.taken = Counter(client for round in done for client in self._chosen(round))

    def run_all(self) -> dict[str, Any]:
        """Do what is left, and return the summary.

        Raises:
            ValueError: too few clients are left in a round, or nothing can be written.
            TrainingStoppedError: asked to stop; `last.pt` has the last whole round.
        """
        while True:
            if self._evaluation_due():
                self._evaluate()
            if self.state.round == self.state.planned_rounds:
                return self._summary()
            try:
                if self.should_stop():
                    raise TrainingStoppedError(0)
                self._round()
            except TrainingStoppedError as stopped:
                self._save()
                raise TrainingStoppedError(self.progress.images) from stopped
            if self._evaluation_due() or self.state.round % self.config.checkpoint_rounds == 0:
                self._save()

    def _chosen(self, round: int) -> tuple[int, ...]:
        config, privacy = self.config, self.config.privacy
        if privacy.level == "client":
            generator = privacy.generator("clients", round, seed=config.seed)
            return sampled_by_coins(self.number, probability=config.fraction, generator=generator)
        return sampled_clients(self.number, fraction=config.fraction, seed=config.seed, round=round)

    def _spent(self) -> dict[str, float]:
        """What the rounds done have told at most: a function of the round, so that resuming needs no state."""
        config, privacy = self.config, self.config.privacy
        if privacy.level == "client":
            found = epsilon(privacy, [(config.fraction, self.state.round)])
        elif privacy.level == "sample":
            clients, size = self.workplace.clients(), config.images_per_step
            rates = {client: steps_of(len(clients[client].train), images_per_step=size) for client in self.taken}
            uses = [(q, steps * config.local_epochs * self.taken[client]) for client, (q, steps) in rates.items()]
            found = epsilon(privacy, uses)
        else:
            found = None
        return {} if found is None else {"epsilon": found, "delta": privacy.delta}

    def _round(self) -> None:
        started = time.perf_counter()
        chosen = self._chosen(self.state.round + 1)
        self.in_round = len(chosen)
        sent = 0 if isinstance(self.workplace.algorithm, Centralized) else _bytes(self.state.shared)
        self.state, update = run_round(
            self.engine,
            self.workplace,
            self.state,
            chosen,
            self.locals,
            min_clients=self.config.min_clients,
            should_stop=self.should_stop if self.stops_within_rounds else never_stop,
            on_client=lambda done, of: self._show(self.state.round + 1, done),
            noise=self.noise,
        )
        if self.config.privacy.level == "sample":
            self.taken.update(chosen)
        self.locals.update(update.local)
        progress = self.progress
        progress.images += update.images
        # Clipped values are in float64, twice as much as what they were made of.
        back = sent if self.noise is None else 2 * sent
        progress.bytes += sent * len(chosen) + back * (len(chosen) - len(update.left_out))
        progress.left_out += len(update.left_out)
        progress.seconds += time.perf_counter() - started
        self._log_round(update)

    def _log_round(self, update: RoundSum) -> None:
        progress, round = self.progress, self.state.round
        losses = [named["loss"] for named in update.metrics.values()]
        if losses:  # with privacy of clients nobody may have come
            self.figures["loss"] = sum(total for total, _ in losses) / max(sum(count for _, count in losses), 1)
        spent = self._spent()
        for each in update.left_out:
            self.run.log({"kind": "left_out", "round": round, "client": each.client, "reason": each.reason})
        self.run.log(
            {
                "kind": "round",
                "round": round,
                "images": progress.images,
                "seconds": progress.seconds,
                **({"loss": self.figures["loss"]} if losses else {}),
                "bytes": progress.bytes,
                "left_out": len(update.left_out),
                **spent,
            }
        )
        self.figures["left_out"] = progress.left_out
        if spent:
            self.figures["epsilon"] = spent["epsilon"]
        self._show(round, self.in_round)

    def _evaluation_due(self) -> bool:
        round = self.state.round
        due = round % self.config.evaluate_every == 0 or round == self.state.planned_rounds
        return round > self.progress.evaluated and due

    def _evaluate(self) -> None:
        progress, state = self.progress, self.state
        self.domains = self.engine.figures(state, self.locals)
        mean = self.mean()
        for domain, figures in (*self.domains.items(), (MEAN, mean)):
            self.run.log({"kind": "test", "round": state.round, "images": progress.images, "domain": domain, **figures})
        progress.evaluated = state.round
        validation = mean.get("validation_accuracy")
        if validation is not None and (progress.chosen is None or validation > progress.chosen["validation_accuracy"]):
            progress.chosen = {
                "round": state.round,
                "validation_accuracy": validation,
                "test_accuracy": mean["accuracy"],
                "domains": {domain: dict(figures) for domain, figures in self.domains.items()},
            }
            self.run.save_checkpoint("best", self._checkpoint())
        self.figures |= {f"test_{name}": value for name, value in mean.items()}
        self._show(state.round, self.in_round)

    def mean(self) -> dict[str, float]:
        """Of the latest figures, over the domains that have clients; `unseen` counts, and has no mean."""
        having = {domain for client in self.workplace.federation.clients for domain in client.domains}
        rows = [figures for domain, figures in self.domains.items() if domain in having]
        names = {name: None for figures in rows for name in figures if name != "unseen"}
        columns = {name: [figures[name] for figures in rows if name in figures] for name in names}
        return {name: sum(values) / len(values) for name, values in columns.items()}

    def _save(self) -> None:
        if self.saved == self.state.round:
            return
        self.progress.metrics_bytes = self.run.metrics_bytes()
        self.run.save_checkpoint("last", self._checkpoint())
        self.saved = self.state.round

    def _checkpoint(self) -> dict[str, Any]:
        state = checkpoint_state(self.state, self.locals, self.workplace.algorithm, self.progress)
        return {**self.about, **state}

    def _show(self, round: int, clients: int) -> None:
        self.on_round(
            RoundProgress(
                round=round,
                rounds=self.state.planned_rounds,
                clients=clients,
                clients_in_round=self.in_round,
                images=self.progress.images,
                figures=dict(self.figures),
                domains=self.domains,
            )
        )

    def _summary(self) -> dict[str, Any]:
        progress = self.progress
        summary: dict[str, Any] = {f"test_{name}": value for name, value in self.mean().items()}
        if progress.chosen is not None:
            summary |= {f"chosen_{name}": value for name, value in progress.chosen.items()}
        return summary | {
            "domains": {domain: dict(figures) for domain, figures in self.domains.items()},
            "rounds": self.state.round,
            "images": progress.images,
            "seconds": progress.seconds,
            "images_per_second": progress.images / progress.seconds,
            "bytes": progress.bytes,
            "left_out": progress.left_out,
            **self._spent(),
            "peak_memory_bytes": peak_memory_bytes(self.workplace.settings.device),
        }


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
