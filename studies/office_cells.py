"""The cells of the study of FedWon's tables (`studies.office_caltech`), and what was published in their place."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

RATES = (0.01, 0.03, 0.08)
SEEDS = (0, 1, 2)
GAMMAS = ("1.0", "1.4", "constant", "2.0", "2.4")
SMALL, FULL = 96, 256
"""Pixels: of the reduced stages, and the papers'."""

METHODS: Mapping[str, tuple[str, str]] = {
    "standalone": ("standalone", "bn"),
    "fedavg": ("fedavg", "bn"),
    "fedbn": ("fedbn", "bn"),
    "fedprox": ("fedprox", "bn"),
    "fedavg+gn": ("fedavg", "gn"),
    "fedavg+ln": ("fedavg", "ln"),
    "silobn": ("silobn", "bn"),
    "fixbn": ("fixbn", "bn"),
    "fedwon": ("fedavg", "none+sws(gamma=constant)"),
    "without": ("fedavg", "none"),
}
"""Algorithm and normalizer, in the order in which they are run.

FedWon is federated averaging of its network; its clipping is a setting here, as of all methods.
"""

PUBLISHED: Mapping[tuple[str, int], float] = {
    ("standalone", 32): 66.3,
    ("fedavg", 32): 66.3,
    ("fedprox", 32): 65.2,
    ("fedavg+gn", 32): 70.9,
    ("fedavg+ln", 32): 61.8,
    ("silobn", 32): 65.8,
    ("fixbn", 32): 65.5,
    ("fedbn", 32): 71.4,
    ("fedwon", 32): 75.6,
    ("without", 32): 55.9,
    ("fedavg", 2): 72.7,
    ("fedavg+gn", 2): 70.4,
    ("fedavg+ln", 2): 69.3,
    ("fixbn", 2): 73.1,
    ("silobn", 2): 70.6,
    ("fedbn", 2): 72.7,
    ("fedwon", 2): 76.1,
    ("without", 2): 65.3,
}
"""Mean over the four domains by method and images per step: tables 1, 2 and 5 of FedWon's workshop paper, full resolution."""

PUBLISHED_CIFAR: Mapping[tuple[str, str], float] = {
    ("fedavg", "iid"): 75.0,
    ("fedavg", "0.1"): 36.0,
    ("fedavg+gn", "iid"): 65.3,
    ("fedavg+gn", "0.1"): 21.5,
    ("fedwon", "iid"): 75.7,
    ("fedwon", "0.1"): 41.9,
}
"""Table 6 there: MobileNetV2, 300 rounds, by method and the alpha of the label skew."""

SECONDS: Mapping[tuple[str, int, int], float] = {
    ("office", FULL, 32): 25.0,
    ("office", FULL, 2): 27.0,
    ("office", SMALL, 32): 8.0,
    ("cifar10", 32, 32): 28.0,
}
"""Of a round by data, pixels and images per step, with one thread, as first measured, but that of the small pictures,
which was guessed; once cells have ended their own seconds count."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One federated run of the study.

    Attributes:
        data: office or cifar10.
        method: of `METHODS`.
        image_size: in pixels.
        images_per_step: B.
        rounds: in all.
        learning_rate: constant.
        clipping: lambda of adaptive gradient clipping; None: off.
        gamma: of FedWon's network; None: the published constant.
        alpha: of the label skew; None: by domain for office, IID for cifar10.
        seed: of the run; the split of the images is the same for all.
    """

    data: str = "office"
    method: str
    image_size: int = SMALL
    images_per_step: int = 32
    rounds: int = 60
    learning_rate: float
    clipping: float | None = None
    gamma: str | None = None
    alpha: str | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The run folder's name."""
        words = [self.data, self.method, f"{self.image_size}px", f"b{self.images_per_step}", f"{self.rounds}rounds"]
        words += [f"lr{self.learning_rate:g}", "agc" if self.clipping else "plain"]
        words += [f"gamma-{self.gamma}"] if self.gamma else []
        words += [f"alpha-{self.alpha}"] if self.alpha else []
        return "-".join([*words, f"seed{self.seed}"])

    def settings(self) -> dict[str, Any]:
        """What `batchless federate` is told, but where the data and the run folder are."""
        algorithm, normalizer = METHODS[self.method]
        if self.gamma is not None:
            normalizer = f"none+sws(gamma={self.gamma})"
        told: dict[str, Any] = {
            "algorithm": algorithm,
            "normalizer": normalizer,
            "rounds": self.rounds,
            "images_per_step": self.images_per_step,
            "data.image_size": self.image_size,
            "data.flip": "true",
            "optimizer.learning_rate": self.learning_rate,
            "evaluate_every": max(1, self.rounds // 12),
            "checkpoint_rounds": max(1, self.rounds // 12),
            "seed": self.seed,
            "workers": 1,
            "threads": 1,
            "tensorboard": "false",
        }
        if algorithm == "fedprox":
            told["mu"] = 1e-3  # FedBN's code for these domains
        if self.clipping is not None:
            told["optimizer.adaptive_clipping"] = self.clipping
        return told | (self._office() if self.data == "office" else self._cifar())

    def _office(self) -> dict[str, Any]:
        return {
            "model": "fedbn_alexnet",
            "weighting": "equal",
            "data.normalize": "none",
            "data.partitioner": "slices",
            "data.images_per_client": 62,
            "data.validation_images": 50,
        }

    def _cifar(self) -> dict[str, Any]:
        skew = {"data.partitioner": "dirichlet", "data.alpha": self.alpha} if self.alpha else {}
        return {"model": "cifar_resnet8", "clients_per_domain": 100, "fraction": 0.1, "local_epochs": 5, **skew}


def stage_a() -> Iterator[Cell]:
    """Full resolution, one seed, 100 rounds: FedAvg, FedBN and FedWon at batch 32 and at batch 2, at the papers' rates.

    At batch 2 the papers give FedWon's alone; there FedAvg does not learn, so both with batch normalization have a tenth too.
    """
    for method, size, rate in (
        ("fedavg", 32, 0.01),
        ("fedbn", 32, 0.01),
        ("fedwon", 32, 0.08),
        ("fedbn", 2, 0.001),
        ("fedwon", 2, 0.01),
        ("fedavg", 2, 0.001),
        ("fedavg", 2, 0.01),
        ("fedbn", 2, 0.01),
    ):
        yield Cell(
            method=method,
            image_size=FULL,
            images_per_step=size,
            rounds=100,
            learning_rate=rate,
            clipping=0.1 if rate == 0.08 else None,
        )


def stage_b(records: Mapping[str, Any], methods: tuple[str, ...] | None = None) -> Iterator[Cell]:
    """Reduced: every method with and without clipping, at every rate for the first seed, then the others at the chosen one.

    Args:
        records: what is kept so far, from which the rates are chosen; a method that lacks a rate has no later seeds yet.
        methods: only these; None: all but `without`.
    """
    for method in methods or [name for name in METHODS if name != "without"]:
        for clipping in (0.1, None):
            first = [Cell(method=method, learning_rate=rate, clipping=clipping) for rate in RATES]
            yield from first
            if (chosen := chosen_rate(first, records)) is not None:
                yield from (replace(chosen, seed=seed) for seed in SEEDS if seed != chosen.seed)


def stage_c(records: Mapping[str, Any]) -> Iterator[Cell]:
    """The cheapest decisive check, at reduced resolution: no normalization with and without weight standardization.

    Once also over the 300 rounds of FedBN's code: unstandardized weights begin with hundreds of steps that change little.
    """
    yield from stage_b(records, ("fedwon", "without"))
    yield from (Cell(method=method, learning_rate=0.08, clipping=0.1, rounds=300) for method in ("without", "fedwon"))


def stage_d() -> Iterator[Cell]:
    """Gamma, at FedWon's published rate and clipping, reduced; `constant` is stage b's cell."""
    for gamma in GAMMAS:
        own = None if gamma == "constant" else gamma
        yield Cell(method="fedwon", learning_rate=0.08, clipping=0.1, gamma=own)


def stage_e() -> Iterator[Cell]:
    """CIFAR-10 over 100 clients, ten of them in a round, five local epochs: IID and with label skew; ResNet-8, 40 rounds."""
    for alpha in (None, "0.1"):
        for method in ("fedavg", "fedavg+gn", "fedwon"):
            yield Cell(data="cifar10", method=method, image_size=32, rounds=40, learning_rate=0.05, alpha=alpha)


def cells(stage: str, records: Mapping[str, Any]) -> list[Cell]:
    """The cells of a stage, as far as they are known by what is kept."""
    match stage:
        case "a":
            return list(stage_a())
        case "b":
            return list(stage_b(records))
        case "c":
            return list(stage_c(records))
        case "d":
            return list(stage_d())
        case "e":
            return list(stage_e())
    raise ValueError(f"stage {stage!r}: there are a, b, c, d, e")


def chosen_rate(candidates: list[Cell], records: Mapping[str, Any]) -> Cell | None:
    """The cell with the best validation accuracy of all its rounds; the smaller rate of equals.

    None: one is still missing, or all have diverged.
    """
    if any(cell.name not in records for cell in candidates):
        return None
    return max(
        (cell for cell in candidates if "failed" not in records[cell.name]["summary"]),
        key=lambda cell: (records[cell.name]["summary"]["chosen_validation_accuracy"], -cell.learning_rate),
        default=None,
    )
