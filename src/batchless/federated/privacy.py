"""What differential privacy adds to a run: its settings, its random numbers, and which networks it refuses.

Letters: C the clipping bound, sigma the noise multiplier, N clients, q the probability with which one takes part.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchless.federated.algorithms import Algorithm, Centralized
from batchless.federated.sharing import tensor_kinds
from batchless.nn.batch_norm import BatchNorm

Level = Literal["none", "client", "sample"]

_SECRET_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Whom the network is to tell nothing of; docs/privacy.md says what that covers and what not.

    Attributes:
        level: none; client, noise on the clipped change of each client, by the server; sample, noise on the clipped gradient
            of each image, by the clients (DP-SGD).
        clip_norm: C, the largest 2-norm of what one client changes in a round, or of one image's gradient; above 0.
        noise_multiplier: sigma: the noise has the standard deviation `sigma * C`. 0 clips only, which protects nobody.
        delta: of (epsilon, delta); below 1 / N, or below 1 / images.
        seed_file: a file of 16 bytes or more that nobody else knows, from which noise, and who takes part, are drawn. None:
            from the run's seed, which everybody knows who has the run's folder: good for experiments only.
    """

    level: Level = "none"
    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    seed_file: str | None = None

    def __post_init__(self) -> None:
        if self.level not in ("none", "client", "sample"):
            raise ValueError(f"privacy.level must be none, client or sample, got {self.level!r}")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"privacy.clip_norm must be above 0 and finite, got {self.clip_norm}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"privacy.noise_multiplier must be 0 or more and finite, got {self.noise_multiplier}")
        if not 0 < self.delta < 1:
            raise ValueError(f"privacy.delta must be above 0 and below 1, got {self.delta}")

    @property
    def noise_std(self) -> float:
        """`sigma * C`, of each element of the sum."""
        return self.noise_multiplier * self.clip_norm

    def generator(self, *words: object, seed: int) -> np.random.Generator:
        """Random numbers for one purpose, a function of the secret and `words`: resuming needs no state.

        Philox with a key of 128 bits, cut from SHA-256; torch's generator has seeds of 32 bits, which can be tried one by one.

        Args:
            words: the purpose, such as "noise" and the round.
            seed: of the run, where there is no `seed_file`.

        Raises:
            ValueError: the file cannot be read, or is too short to be a secret.
        """
        text = "/".join(map(str, words)).encode()
        digest = hashlib.sha256(self._secret(seed) + b"\0" + text).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    def _secret(self, seed: int) -> bytes:
        if self.seed_file is None:
            return f"seed {seed}".encode()
        try:
            secret = Path(self.seed_file).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(f"privacy.seed_file {self.seed_file} cannot be read: {error.strerror}") from error
        if len(secret) < _SECRET_BYTES:
            raise ValueError(
                f"privacy.seed_file {self.seed_file} has {len(secret)} bytes, a secret has {_SECRET_BYTES} or more: "
                f"head -c 32 /dev/urandom > {self.seed_file}"
            )
        return hashlib.sha256(secret).digest()


def sampled_by_coins(number: int, *, probability: float, generator: np.random.Generator) -> tuple[int, ...]:
    """Each of `range(number)` with this probability, independently: Poisson sampling, which the accountant assumes.

    Nobody may be among them.

    >>> sampled_by_coins(5, probability=1.0, generator=np.random.default_rng(0))
    (0, 1, 2, 3, 4)
    """
    return tuple(np.flatnonzero(generator.random(number) < probability).tolist())


def require_private(privacy: PrivacySettings, algorithm: Algorithm, model: nn.Module) -> None:
    """ValueError if this algorithm on this network would let out what no noise covers."""
    if privacy.level == "none":
        return
    if privacy.level == "client" and algorithm.local:
        raise ValueError(
            f"privacy.level=client: {algorithm.name} keeps tensors with the clients, which checkpoints hold without noise; "
            "choose fedavg, fedprox or fedwon"
        )
    if privacy.level == "client" and isinstance(algorithm, Centralized):
        raise ValueError("privacy.level=client: centralized has no clients to hide; choose privacy.level=sample")
    kinds = tensor_kinds(model)
    for name, module in model.named_modules():
        statistics = [
            own for own, _ in module.named_buffers(recurse=False) if kinds.get(f"{name}.{own}") == "statistic"
        ]
        if statistics or isinstance(module, _BatchNorm | BatchNorm):
            raise ValueError(
                f"privacy.level={privacy.level}: {name} ({type(module).__name__}) computes with statistics over several "
                "images, which mix them without noise; choose a normalizer that looks at one image: none+sws (fedwon), gn, "
                "ln or in"
            )


def explain_privacy(privacy: PrivacySettings, *, clients: int, fraction: float) -> str:
    """What the settings do, in words; empty without privacy.

    Args:
        privacy: the settings.
        clients: N.
        fraction: q.
    """
    if privacy.level == "none":
        return ""
    sigma, bound = privacy.noise_multiplier, privacy.clip_norm
    if privacy.level == "client":
        lines = [
            f"privacy of clients: each one's change clipped to {bound:g}, noise {privacy.noise_std:g} on the sum, divided by "
            f"{fraction * clients:g}; clients weigh equally",
            ""
            if fraction == 1
            else f"each client takes part with probability {fraction:g}, independently of the others",
        ]
    else:
        lines = [
            f"privacy of images: each one's gradient clipped to {bound:g}, noise {privacy.noise_std:g} on the sum of a step; "
            "clients weigh equally",
        ]
    lines.append("" if sigma else "noise_multiplier is 0: nobody is protected")
    if privacy.seed_file is None:
        lines.append("the noise is drawn from the run's seed: an experiment; for a release give privacy.seed_file")
    return "\n".join(line for line in lines if line)
