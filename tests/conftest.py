"""What every test starts from: a seed, one thread, hypothesis without clock or database; and the real data, where it is."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from batchless.nn import WSConv2d
from batchless.nn.reparameterized import Reparameterized
from batchless.nn.standardized_rows import StandardizedRows

torch.set_num_threads(1)

hypothesis.settings.register_profile("batchless", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("batchless")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the unpacked real data sets: `$BATCHLESS_DATA`, else `~/.cache/batchless-data`."""
    folder = Path(os.environ.get("BATCHLESS_DATA") or Path.home() / ".cache" / "batchless-data").expanduser()
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder} (set BATCHLESS_DATA to their folder)")
    return folder


@pytest.fixture
def computed_weights(monkeypatch) -> list[int]:
    """The address of W for each time that a `W_hat` was computed from it, in either of the two ways there are."""
    seen: list[int] = []
    for kind in _kinds_below(Reparameterized):
        if "reparameterized_weight" in vars(kind):
            monkeypatch.setattr(kind, "reparameterized_weight", _noted(seen, kind.reparameterized_weight))
    of = StandardizedRows.of

    def noted_of(rule, rows):
        seen.append(rows.data_ptr())
        return of(rule, rows)

    monkeypatch.setattr(StandardizedRows, "of", noted_of)
    layer = WSConv2d(2, 2, 3)
    layer.effective_weight()
    assert seen == [layer.weight.data_ptr()], "so the list does note"
    seen.clear()
    return seen


def _noted(seen, compute):
    def noted(self):
        seen.append(self.weight.data_ptr())
        return compute(self)

    return noted


def _kinds_below(kind):
    for below in kind.__subclasses__():
        yield below
        yield from _kinds_below(below)
