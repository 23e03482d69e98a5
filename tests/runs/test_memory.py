"""The peak of a run, not of the process it runs in."""

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from batchless.runs.memory import forget_peak_memory, peak_memory_bytes

SIZE = 256 * 2**20


@pytest.fixture(autouse=True)
def no_garbage() -> Iterator[None]:
    """What earlier tests left in cycles is freed before, not by a collection in between, and none runs meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_peak_is_seen():
    forget_peak_memory("cpu")
    before = peak_memory_bytes("cpu")
    held = torch.ones(SIZE, dtype=torch.uint8)
    assert peak_memory_bytes("cpu") >= before + 0.9 * SIZE
    assert held[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the process can be forgotten on Linux only")
def test_what_was_before_is_forgotten():
    held = torch.ones(SIZE, dtype=torch.uint8)
    high = peak_memory_bytes("cpu")
    del held
    forget_peak_memory("cpu")
    assert peak_memory_bytes("cpu") <= high - 0.8 * SIZE
