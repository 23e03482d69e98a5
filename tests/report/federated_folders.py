"""Run folders as `batchless federate` leaves them, without any training."""

import json
import math
import random
from pathlib import Path

from report_folders import conversion

from batchless.runs import Run, RunFolder, read_run

DOMAINS = ("amazon", "caltech", "dslr", "webcam")
CLASSES = tuple("zero one two three four five six seven eight nine".split())
METHODS = {("fedavg", "bn"): 0.62, ("fedbn", "bn"): 0.7, ("fedwon", "none+sws"): 0.74}
PARAMETERS_BYTES = 56_876_840


def record(
    *, clients_per_domain: int = 1, seed: int = 0, unseen: tuple[str, ...] = (), alpha: float | None = None
) -> dict[str, object]:
    """A partition as `Federation.record` holds it, skewed where `alpha` is given."""
    numbers = random.Random(seed)
    clients, domains = [], [domain for domain in DOMAINS if domain not in unseen]
    for domain in domains:
        for _ in range(clients_per_domain):
            shares = [1.0 if alpha is None else numbers.gammavariate(alpha, 1.0) for _ in CLASSES]
            counts = [round(62 * share / sum(shares)) for share in shares]
            clients.append(
                {
                    "id": len(clients),
                    "domain": domain,
                    "train": list(range(sum(counts))),
                    "validation": list(range(200, 210)),
                    "counts": counts,
                    "validation_counts": [1] * len(CLASSES),
                }
            )
    rule = {"name": "iid"} if alpha is None else {"name": "dirichlet", "alpha": alpha, "minimum": 1}
    return {
        "partitioner": rule,
        "seed": seed,
        "classes": list(CLASSES),
        "domains": list(DOMAINS),
        "unseen": list(unseen),
        "clients": clients,
        "tests": {domain: {"images": 59, "counts": [6] * 9 + [5]} for domain in DOMAINS},
    }


def write_federated_run(
    folder: Path,
    algorithm: str = "fedavg",
    normalizer: str = "bn",
    *,
    seed: int = 0,
    accuracy: float = 0.7,
    rounds: int = 20,
    validates: bool = True,
    failed: str | None = None,
    left_out: int = 0,
    epsilon: float | None = None,
    partition: dict[str, object] | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """A whole run folder, or that of a run that failed after its second round; four domains, the last one hardest."""
    numbers = random.Random(f"{algorithm} {normalizer} {seed}")
    settings: dict[str, object] = {
        "kind": "federate",
        "algorithm": algorithm,
        "mu": 0.01 if algorithm == "fedprox" else None,
        "server": {"name": "average"},
        "model": "fedbn_alexnet",
        "normalizer": normalizer,
        "rounds": rounds,
        "local_epochs": 1,
        "images_per_step": 32,
        "seed": seed,
        "out": str(folder),
        "data": {"seed": 0, "unseen_domains": []},
        "optimizer": {"name": "sgd", "lr": 0.01},
        **(config or {}),
    }
    sent = 0 if algorithm == "centralized" else PARAMETERS_BYTES
    chosen: dict[str, object] = {}
    mean: dict[str, float] = {}
    domains: dict[str, dict[str, float]] = {}
    with RunFolder.create(folder, config=settings, seed=seed) as run:
        for round_ in range(1, 3 if failed else rounds + 1):
            if round_ == 3 and left_out:
                run.log({"kind": "left_out", "round": 3, "client": 1, "reason": "its update holds what is no number"})
            at = {"round": round_, "images": 248 * round_}
            gone = int(bool(left_out) and round_ == 3)
            run.log(
                {
                    "kind": "round",
                    **at,
                    "seconds": 2.0 * round_,
                    "loss": 2.3 / round_,
                    "bytes": 8 * sent * round_,
                    "left_out": gone,
                    **({} if epsilon is None else {"epsilon": epsilon * round_ / rounds}),
                }
            )
            share = 1 - math.exp(-3 * round_ / rounds)
            domains = {}
            for place, domain in enumerate(DOMAINS):
                level = accuracy + 0.12 - 0.08 * place
                noise = 0.015 * numbers.gauss(0, 1)
                domains[domain] = {"accuracy": 0.1 + (level - 0.1) * share + noise, "loss": 1.0}
                if validates:
                    domains[domain]["validation_accuracy"] = domains[domain]["accuracy"] + 0.02 * numbers.gauss(0, 1)
            keys = domains[DOMAINS[0]]
            mean = {key: sum(figures[key] for figures in domains.values()) / len(domains) for key in keys}
            for domain, figures in (*domains.items(), ("mean", mean)):
                run.log({"kind": "test", **at, "domain": domain, **figures})
            if validates and mean["validation_accuracy"] > chosen.get("validation_accuracy", -1):
                chosen = {
                    "round": round_,
                    "test_accuracy": mean["accuracy"],
                    "validation_accuracy": mean["validation_accuracy"],
                }
        summary = {
            **{f"test_{key}": value for key, value in mean.items()},
            **{f"chosen_{key}": value for key, value in chosen.items()},
            "domains": domains,
            "rounds": rounds,
            "images": 248 * rounds,
            "seconds": 2.0 * rounds,
            "bytes": 8 * sent * rounds,
            "left_out": left_out,
        }
        run.finish({"failed": failed} if failed else summary)
    (folder / "conversion.json").write_text(json.dumps(conversion(normalizer)))
    (folder / "partition.json").write_text(json.dumps(record() if partition is None else partition))
    (folder / "sharing.txt").write_text(
        "kind    tensors  elements  what happens\nweight       16  57044810  averaged\n"
    )
    return folder


def write_federation_study(root: Path, *, seeds: int = 3, rounds: int = 20, **more: object) -> list[Run]:
    """Three methods, three seeds each; FedBN loses a client once."""
    return [
        read_run(
            write_federated_run(
                root / f"{algorithm}-{normalizer}-{seed}",
                algorithm,
                normalizer,
                seed=seed,
                accuracy=accuracy + 0.01 * random.Random(f"{algorithm}{seed}").gauss(0, 1),
                rounds=rounds,
                left_out=int(algorithm == "fedbn" and seed == 0),
                **more,
            )
        )
        for (algorithm, normalizer), accuracy in METHODS.items()
        for seed in range(seeds)
    ]
