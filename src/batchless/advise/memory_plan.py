"""What the planner says: where the memory goes, what fits, and how it prints."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from batchless.runs.folder import strict_json

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class LevelPlan:
    """What one level of `batchless.lean` needs and allows.

    Attributes:
        level: 0: everything that autograd saves is kept.
        saved_per_image: bytes that live from the forward to the backward pass, for each image of a micro-batch.
        peak_per_image: bytes that each image adds to the most that is alive at once.
        peak_at_one: bytes beside the fixed ones at the fewest images that train.
        images_per_forward_at_most: the largest micro-batch that fits; 0: none does.
        images_per_forward: the largest one that fits and divides the wanted step; 0: none does.
        forwards_per_step: so many of it give the wanted step.
        relative_time: of that step, level 0's being 1; None where it does not fit.
    """

    level: int
    saved_per_image: int
    peak_per_image: int
    peak_at_one: int
    images_per_forward_at_most: int
    images_per_forward: int
    forwards_per_step: int
    relative_time: float | None


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where the memory of a training step goes, in bytes, and which micro-batches fit; prints as a table.

    Attributes:
        model: its name, or its class.
        normalizer: that it is planned with.
        image: the shape of one image (or clip) as the network sees it.
        optimizer: whose state is counted.
        memory: what there is.
        images_per_step: wanted.
        parameters: of the model.
        buffers: of the model, such as running statistics.
        gradients: of the trainable parameters.
        optimizer_state: of the trainable parameters.
        standardized_weights: `W_hat` and what its pull-back keeps.
        levels: what each level of leanness needs and allows.
        notes: what else to know.
    """

    model: str
    normalizer: str
    image: tuple[int, ...]
    optimizer: str
    memory: int
    images_per_step: int
    parameters: int
    buffers: int
    gradients: int
    optimizer_state: int
    standardized_weights: int
    levels: tuple[LevelPlan, ...]
    notes: tuple[str, ...]

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        return self.parameters + self.buffers + self.gradients + self.optimizer_state + self.standardized_weights

    @property
    def fits(self) -> bool:
        """Whether the model trains in this memory at some level."""
        return any(level.images_per_forward_at_most for level in self.levels)

    def json(self) -> str:
        """All figures, in bytes."""
        return strict_json({**asdict(self), "fixed": self.fixed, "fits": self.fits}, indent=2)

    def __str__(self) -> str:
        """The fixed parts, a row for each level, the notes."""
        size = " x ".join(map(str, self.image))
        fixed = [
            ("parameters", mebibytes(self.parameters)),
            ("gradients", mebibytes(self.gradients)),
            (f"state of {self.optimizer}", mebibytes(self.optimizer_state)),
            ("standardized weights", mebibytes(self.standardized_weights)),
            ("buffers", mebibytes(self.buffers)),
            ("in all, for any micro-batch", mebibytes(self.fixed)),
        ]
        levels = [
            (
                "lean",
                "saved per image",
                "at the peak",
                "images per forward",
                f"{self.images_per_step} per step",
                "time",
            ),
            *(_row(level) for level in self.levels),
        ]
        notes = [f"note: {note}" for note in self.notes]
        title = f"{self.model}, {self.normalizer}, images {size}, in {self.memory / 2**30:.2f} GiB"
        return "\n".join([title, "", *_aligned(fixed), "", *_aligned(levels), *([""] if notes else []), *notes])


def _row(level: LevelPlan) -> tuple[str, ...]:
    most, few = level.images_per_forward_at_most, level.images_per_forward
    return (
        str(level.level),
        mebibytes(level.saved_per_image),
        mebibytes(level.peak_per_image),
        f"at most {most}" if most else "does not fit",
        f"{level.forwards_per_step} x {few}" if few else "-",
        "-" if level.relative_time is None else f"{level.relative_time:.2f}",
    )


def mebibytes(size: int) -> str:
    """`97.5 MiB`."""
    return f"{size / 2**20:,.1f} MiB"


def bytes_of(text: str) -> int:
    """The bytes that a text such as `8GiB` or `6000 MB` stands for.

    Raises:
        ValueError: no number with a unit, or none above 0.

    >>> bytes_of("1.5GiB"), bytes_of("6000 MB")
    (1610612736, 6000000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(
            f"memory got {text!r}: expected a number above 0 with one of {', '.join(_UNITS)}, such as 8GiB"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
