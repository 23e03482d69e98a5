"""How much has been told so far: (epsilon, delta), by Opacus' accountant."""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from batchless.federated.privacy import PrivacySettings


def steps_of(images: int, *, images_per_step: int) -> tuple[float, int]:
    """The probability q with which an image is in a step of DP-SGD, and the steps of an epoch.

    `q = min(1, B / n)` and `ceil(n / B)` steps, B images per step expected. How many images n a client has counts as known.

    >>> steps_of(62, images_per_step=32), steps_of(5, images_per_step=32)
    ((0.5161290322580645, 2), (1.0, 1))
    """
    return min(1.0, images_per_step / images), -(-images // images_per_step)


def epsilon(privacy: PrivacySettings, uses: Iterable[tuple[float, int]]) -> float | None:
    """Epsilon at `privacy.delta` of the one who was used most; None without noise, where there is none.

    Each use is a number of releases of the Gaussian mechanism on a Poisson sample, composed and converted by Renyi
    differential privacy, an upper bound. Neighbours are data with and without the client (or the image).

    Args:
        privacy: sigma and delta.
        uses: of each client, or of any image of each client: the probability q of being in a release, and releases.

    Raises:
        ValueError: Opacus is not installed.
    """
    if not privacy.noise_multiplier:
        return None
    analysis, orders = _opacus()
    most = 0.0
    for q, steps in set(uses):
        if steps:
            rdp = [steps * value for value in _rdp_of_one(q, privacy.noise_multiplier)]
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # the best order may be the last one tried: the bound holds all the same
                found, _ = analysis.get_privacy_spent(orders=orders, rdp=rdp, delta=privacy.delta)
            most = max(most, float(found))
    return most if math.isfinite(most) else None


def require_opacus() -> None:
    """ValueError that names the extra, if Opacus is not installed."""
    _opacus()


@lru_cache(maxsize=1024)
def _rdp_of_one(q: float, sigma: float) -> tuple[float, ...]:
    analysis, orders = _opacus()
    return tuple(float(value) for value in analysis.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=orders))


def _opacus() -> tuple[Any, list[float]]:
    """Its analysis of Renyi differential privacy, and the orders that its accountant tries."""
    try:
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis import rdp
    except ImportError as error:
        raise ValueError("privacy needs Opacus: pip install 'batchless[dp]'") from error
    return rdp, list(RDPAccountant.DEFAULT_ALPHAS)
