"""Waiting for data is told from training."""

from collections.abc import Iterator

import pytest

from batchless.train import waiting
from batchless.train.waiting import MUCH, Waiting, advice_on_waiting


def test_only_the_time_until_a_batch_is_there_counts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: now[0])

    def slow() -> Iterator[int]:
        for batch in range(3):
            now[0] += 2
            yield batch
        now[0] += 1

    timed = Waiting[int]()
    for _ in timed.timed(slow()):
        now[0] += 10  # the training
    assert timed.seconds == 3 * 2 + 1


def test_an_error_of_the_data_comes_through():
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("no such image")

    with pytest.raises(ValueError, match="no such image"):
        list(Waiting[int]().timed(failing()))


def test_advice_begins_at_the_stated_share():
    assert advice_on_waiting(MUCH - 0.01, workers=2) is None
    assert "data.workers (now 2)" in str(advice_on_waiting(MUCH, workers=2))
