"""What the doctor says: the findings, and how they print."""

import textwrap
from collections import defaultdict
from dataclasses import dataclass

from batchless.advise.findings import Finding, images

_NAMES_SHOWN = 3
_WIDTH = 110


@dataclass(frozen=True)
class Diagnosis:
    """What breaks or misleads when a model is trained so; prints as a table.

    Attributes:
        model: its name, or its class.
        images_per_forward: images of one forward.
        images_per_step: images of one optimizer step.
        normalizations: how many normalization layers the model has.
        findings: all, in the model's order.
        conversion: lines that say how to convert the model, and what that leaves; none where it would not help.
        notes: what the dry run could not see, and what else to know.
    """

    model: str
    images_per_forward: int
    images_per_step: int
    normalizations: int
    findings: tuple[Finding, ...]
    conversion: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        """A summary line; a row for each finding, with its layers, the reason and the fix; the conversion."""
        lines = [self._summary()]
        for severity, kind, layers, explanation, fix in self._rows():
            lines += ["", f"{severity:<8} {kind:<13} {layers}"]
            lines += textwrap.wrap(explanation, _WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 9)
            lines += textwrap.wrap(f"-> {fix}", _WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 12)
        for paragraph in (self.conversion, tuple(f"note: {note}" for note in self.notes)):
            lines += ["", *paragraph] if paragraph else []
        return "\n".join(lines)

    def _summary(self) -> str:
        step = f", {self.images_per_step} per step" if self.images_per_step != self.images_per_forward else ""
        setting = f"{self.model} at {images(self.images_per_forward)} per forward{step}"
        layers = f"{self.normalizations} normalization layer{'s' if self.normalizations != 1 else ''}"
        if self.ok:
            return f"{setting}: nothing wrong with its {layers}"
        errors = sum(finding.severity == "error" for finding in self.findings)
        affected = len({finding.layer for finding in self.findings})
        return f"{setting}: {affected} of {layers} affected, {errors} error{'s' if errors != 1 else ''}"

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        """The same finding on many layers as one row; errors first."""
        groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
        for finding in sorted(self.findings, key=lambda finding: finding.severity != "error"):
            groups[finding.severity, finding.kind, finding.explanation, finding.fix].append(finding.layer or "(model)")
        rows = []
        for (severity, kind, explanation, fix), names in groups.items():
            more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            layers = f"{len(names):>4}  {', '.join(names[:_NAMES_SHOWN])}{more}"
            rows.append((severity, kind, layers, explanation, fix))
        return rows
