"""What a conversion did, layer by layer."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Action = Literal["replaced", "kept", "skipped"]


@dataclass(frozen=True)
class Entry:
    """One layer: `replaced` by another, `kept` as the rules say, or `skipped` because it could not be replaced."""

    name: str
    action: Action
    was: str
    now: str
    detail: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; prints as a table.

    Args:
        normalizer: canonical name.
        found_by: how it was found which layer feeds which: from an `example`'s data flow, or from the model's `structure`.
        entries: one for each convolution and normalization, in the model's order.
        notes: what of the model's function changed, and what to do about it.
    """

    normalizer: str
    found_by: Literal["example", "structure"]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """Layers that were replaced."""
        return self._with("replaced")

    @property
    def kept(self) -> tuple[Entry, ...]:
        """Layers that the rules leave as they are."""
        return self._with("kept")

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """Layers that the normalizer was meant for but could not replace."""
        return self._with("skipped")

    def records(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold: normalizer, found_by, notes, entries."""
        return {
            "normalizer": self.normalizer,
            "found_by": self.found_by,
            "notes": list(self.notes),
            "entries": [asdict(entry) for entry in self.entries],
        }

    def _with(self, action: Action) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.action == action)

    def __str__(self) -> str:
        """Table of all layers, with a summary line above and the notes below."""
        summary = (
            f"{self.normalizer}: {len(self.replaced)} layers replaced, {len(self.kept)} kept, {len(self.skipped)} skipped; "
            f"pairs found by {self.found_by}"
        )
        rows = [("layer", "action", "was", "now", "detail")]
        rows += [(e.name or "(model)", e.action, e.was, e.now, e.detail) for e in self.entries]
        return "\n".join([summary, "", *aligned(rows), "", *(f"note: {note}" for note in self.notes)]).rstrip()


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines with columns under each other."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
