"""The metrics of a run as TensorBoard events."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventWriter:
    """Writes scalars `<kind>/<name>` (`<kind>/<domain>/<name>`) at the number of images seen; made with the first of them.

    Args:
        folder: of the event files.
        resumed_at: images from which on the events of an earlier process are to be forgotten; None: a new run.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        self._folder, self._resumed_at = folder, resumed_at
        self._writer: Any = None

    def add(self, record: Mapping[str, float | int | str]) -> None:
        """Add the numbers of a record of `metrics.jsonl`; one without `images` is passed over."""
        if "images" not in record:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self._resumed_at is None else self._resumed_at + 1
            self._writer = SummaryWriter(self._folder, purge_step=purge)
        group = "/".join(str(record[key]) for key in ("kind", "domain") if key in record) or "run"
        for name, value in record.items():
            if name not in ("kind", "images") and isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{name}", value, record["images"])

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
