"""Federated runs of seconds on real handwriting in three domains: as it is, inverted, and pale."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from batchless.federated import FederateConfig, FederatedDataSettings, ServerSettings
from batchless.federated.client import CLIENT_OPTIMIZER
from batchless.federated.privacy import PrivacySettings
from batchless.federated.rounds import OnRound, RoundProgress
from batchless.runs import load_checkpoint, read_run
from batchless.train import OptimizerSettings

OPTIMIZER = OptimizerSettings(**{**vars(CLIENT_OPTIMIZER), "learning_rate": 0.05})
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.1},
    "silobn": {"fraction": 0.6},
    "fedbn": {"fraction": 0.6},
    "fixbn": {},
    "fedwon": {},
    "standalone": {},
    "centralized": {},
    "fedadam": {"algorithm": "fedavg", "server": ServerSettings(name="fedadam", learning_rate=0.02), "fraction": 0.6},
    "private clients": {
        "algorithm": "fedavg",
        "normalizer": "gn",
        "server": ServerSettings(name="fedadam", learning_rate=0.02),
        "fraction": 0.6,
        "privacy": PrivacySettings(level="client", clip_norm=0.1, noise_multiplier=0.5),
    },
    "private images": {"algorithm": "fedwon", "privacy": PrivacySettings(level="sample", noise_multiplier=0.5)},
}
"""Three clients in each domain, so a round has nine: a block of eight and one more; 60 % of them are five."""


def write_domains(root: Path, *, train: int = 36, test: int = 15) -> Path:
    """Each domain has digits of its own: 8x8, as they lie in scikit-learn."""
    digits = load_digits()
    images = (digits.images * 15.9).astype(np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    begin = 0
    for name, change in (("inverted", lambda x: 255 - x), ("pale", lambda x: 100 + x // 4), ("plain", lambda x: x)):
        parts = {"train": slice(begin, begin + train), "test": slice(begin + train, begin + train + test)}
        begin += train + test
        arrays = {
            f"{split}_{what}": values[part]
            for split, part in parts.items()
            for what, values in (("images", change(images)), ("labels", digits.target))
        }
        np.savez(root / f"{name}.npz", **arrays)
    return root


def config(name: str, root: Path, out: Path, **changes: Any) -> FederateConfig:
    """Two rounds of an algorithm (of `ALGORITHMS`) on the domains in `root`."""
    data = FederatedDataSettings(root=str(root), image_size=8, crop_padding=1, **changes.pop("data", {}))
    values: dict[str, Any] = {
        "algorithm": name,
        "rounds": 2,
        "clients_per_domain": 3,
        "images_per_step": 4,
        "workers": 1,
        "tensorboard": False,
        "optimizer": OPTIMIZER,
    }
    return FederateConfig(out=str(out), data=data, **(values | ALGORITHMS.get(name, {}) | changes))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{prefix}/{key}").items()}


def result(folder: Path) -> dict[str, Any]:
    """All that two runs of the same bits have in common: tensors, counts, figures; no seconds."""
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.pt")
    progress = checkpoint["training"]["progress"]
    for name in ("seconds", "metrics_bytes"):
        del progress[name]
    kept = {name: checkpoint[name] for name in ("model", "locals", "round", "images", "training")}
    run = read_run(folder)
    lines = {str(i): {k: v for k, v in line.items() if k != "seconds"} for i, line in enumerate(run.metrics)}
    summary = {k: v for k, v in (run.summary or {}).items() if "second" not in k and k != "peak_memory_bytes"}
    return flat({"checkpoint": kept, "metrics": lines, "summary": summary})


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The names of tensors that differ."""
    return [name for name, value in first.items() if isinstance(value, Tensor) and not torch.equal(value, second[name])]


def script(name: str, *words: object, processes: int = 1) -> list[str]:
    """The command that runs a file of this folder, in one process or by torchrun in several."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        launch += ["--nproc_per_node", str(processes)]
    return [*launch, str(Path(__file__).with_name(name)), *map(str, words)]


def held_in(round: int) -> OnRound:
    """Goes no further than this round, so that who kills the run may be late: on a busy machine it would have ended."""

    def hold(progress: RoundProgress) -> None:
        while progress.round >= round:
            signal.pause()

    return hold


def saved(rounds: int) -> Callable[[Any], bool]:
    """Of a checkpoint: whether so many rounds are done."""
    return lambda checkpoint: bool(checkpoint["round"] >= rounds)
