"""What every test starts from: a seed, one thread, hypothesis without clock or database; and the real data, where it is."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

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
