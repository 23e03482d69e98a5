"""What the server makes of the clients' mean: the mean itself, or a step of its own towards it.

Letters: x_t the server's tensor before the round, `mean` the clients' weighted mean, Delta_t = mean - x_t.
All act on one tensor at a time and only on trainable ones; buffers are always averaged (`batchless.federated.server`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class ServerOptimizer(Protocol):
    """From x_t and the clients' mean to x_{t+1}: a pure function."""

    name: ClassVar[str]

    def step(self, value: Tensor, mean: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The tensor after the round and the moments to hand in next time.

        Args:
            value: x_t, in the network's type.
            mean: of the clients, float64, which everything is computed in.
            moments: what the step before has returned, as float64; empty in the first round.
        """


@dataclass(frozen=True, kw_only=True)
class Average:
    """`x_{t+1} = mean`: plain federated averaging (McMahan et al., arXiv 1602.05629)."""

    name: ClassVar[str] = "average"

    def step(self, value: Tensor, mean: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean; no moments."""
        return mean, {}


@dataclass(frozen=True, kw_only=True)
class FedAvgM:
    """Server momentum: `v_t = momentum * v_{t-1} + Delta_t`, `x_{t+1} = x_t + learning_rate * v_t`, `v_{-1} = 0`.

    Attributes:
        learning_rate: above 0; 1 goes all the way to the mean.
        momentum: in [0, 1); with 0 and learning rate 1 this is `Average`, bit for bit.

    Source: Hsu et al., arXiv 1909.06335, section 4.3 (without Nesterov's form).
    """

    name: ClassVar[str] = "fedavgm"
    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _require_rates(self.name, learning_rate=self.learning_rate, momentum=self.momentum)

    def step(self, value: Tensor, mean: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step with momentum."""
        delta = mean - value
        momentum = delta + self.momentum * moments["momentum"] if moments else delta
        # x + lr v, written from the mean: x + (mean - x) would not have the mean's bits.
        return mean + (self.learning_rate * momentum - delta), {"momentum": momentum}


@dataclass(frozen=True, kw_only=True)
class FedAdam:
    """Adam on the server: `x_{t+1} = x_t + learning_rate * m_t / (sqrt(v_t) + tau)`.

    `m_t = beta1 m_{t-1} + (1 - beta1) Delta_t`, `v_t = beta2 v_{t-1} + (1 - beta2) Delta_t^2`, from `m_{-1} = 0` and
    `v_{-1} = tau^2`. As in the paper there is no bias correction (Flower's FedAdam has one, and starts v at 0), tau
    stands outside the root, and it is the degree of adaptivity: with a large tau the step is momentum's, with rate
    `learning_rate / tau`.

    Attributes:
        learning_rate: above 0; about the largest change of a weight in one round.
        beta1: in [0, 1); 0 forgets earlier rounds.
        beta2: in [0, 1); memory of the squares.
        tau: above 0, in the unit of a weight's change.

    Source: Reddi et al., arXiv 2003.00295, algorithm 2.
    """

    name: ClassVar[str] = "fedadam"
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _require_rates(self.name, learning_rate=self.learning_rate, beta1=self.beta1, beta2=self.beta2, tau=self.tau)

    def step(self, value: Tensor, mean: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of Adam."""

        def moved(second: Tensor, square: Tensor) -> Tensor:
            return self.beta2 * second + (1 - self.beta2) * square

        return _adaptive_step(self, value, mean, moments, moved)


@dataclass(frozen=True, kw_only=True)
class FedYogi:
    """As `FedAdam`, with `v_t = v_{t-1} - (1 - beta2) Delta_t^2 sign(v_{t-1} - Delta_t^2)`: v moves by steps, not shares.

    Attributes:
        learning_rate: above 0.
        beta1: in [0, 1).
        beta2: in [0, 1).
        tau: above 0.

    Source: Reddi et al., arXiv 2003.00295, algorithm 2.
    """

    name: ClassVar[str] = "fedyogi"
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _require_rates(self.name, learning_rate=self.learning_rate, beta1=self.beta1, beta2=self.beta2, tau=self.tau)

    def step(self, value: Tensor, mean: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of Yogi."""

        def moved(second: Tensor, square: Tensor) -> Tensor:
            return second - (1 - self.beta2) * square * torch.sign(second - square)

        return _adaptive_step(self, value, mean, moments, moved)


SERVER_OPTIMIZERS = (Average, FedAvgM, FedAdam, FedYogi)


def _adaptive_step(
    rule: FedAdam | FedYogi,
    value: Tensor,
    mean: Tensor,
    moments: Mapping[str, Tensor],
    moved: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the adaptive rules share; `moved` makes the second moment from its last value and the change's square."""
    delta = mean - value
    first = moments["first"] if moments else torch.zeros_like(delta)
    second = moments["second"] if moments else torch.full_like(delta, rule.tau * rule.tau)
    first = rule.beta1 * first + (1 - rule.beta1) * delta
    second = moved(second, delta.square())
    return value + rule.learning_rate * first / (second.sqrt() + rule.tau), {"first": first, "second": second}


def _require_rates(name: str, **values: float) -> None:
    for field, value in values.items():
        if field in ("learning_rate", "tau"):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: {field} must be above 0, got {value}")
        elif not 0 <= value < 1:
            raise ValueError(f"{name}: {field} must be in [0, 1), got {value}")
