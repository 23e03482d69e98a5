"""How long a training waits for its data, and what to do where that is long."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

MUCH = 0.2
"""Share of the training time spent waiting for data from which on the user is told."""


@dataclass
class Waiting(Generic[T]):
    """Seconds between asking for a batch and having it; what a device computes meanwhile is not waited for."""

    seconds: float = 0.0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; `seconds` grows by what each took to come."""
        items = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - begin
            yield item


def advice_on_waiting(share: float, *, workers: int) -> str | None:
    """One line on what to do where `share` of the training time went by waiting for data; None where that is little.

    >>> advice_on_waiting(0.05, workers=0)
    >>> advice_on_waiting(0.5, workers=0)
    '50 % of the training time was spent waiting for data: raise data.workers (now 0), or store smaller images'
    """
    if share < MUCH:
        return None
    return (
        f"{share:.0%} of the training time was spent waiting for data: raise data.workers (now {workers}), "
        "or store smaller images"
    ).replace("%", " %", 1)
