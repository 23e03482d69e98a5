"""From a checkpoint to a file for deployment, checked against the network that was trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from batchless.deploy.about import about
from batchless.deploy.detector_graph import detector_onnx_bytes
from batchless.deploy.exportable import EXPORTABLE, UNSCALED, Exportable, Format
from batchless.deploy.folded import folded_bytes, folded_plain, run_folded, with_normalization
from batchless.deploy.formats import (
    Run,
    first_line,
    onnx_bytes,
    program_bytes,
    require_onnx,
    run_onnx,
    run_program,
    traced,
)
from batchless.deploy.real_inputs import BATCHES
from batchless.runs.atomic import reason, replacing
from batchless.tasks import Trained, load_trained
from batchless.tasks.trained import example_input

TOLERANCE = 1e-3
"""Largest difference allowed, relative to the largest score. Rounding gives 1e-7 to 1e-5, a wrong weight 1e-1."""

_SUFFIXES: dict[Format, str] = {"torch": ".folded.pt", "onnx": ".onnx", "exported_program": ".pt2"}
_OPSETS = range(18, 26)
"""What torch's exporter writes, and converts to."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `batchless export` writes.

    Attributes:
        checkpoint: of a run.
        format: `onnx`; `exported_program`, a `.pt2` that `torch.export.load` reads, not of detectors; `torch`, a state dict
            that `batchless.deploy.load_folded` reads.
        out: the file, which is replaced if it is there; None: beside the checkpoint.
        opset: of `onnx`, 18 to 25; None: what torch chooses.
        include_normalization: whether the network normalizes images itself, and takes them scaled to [0, 1];
            detectors always do.
    """

    checkpoint: str
    format: Format = "onnx"
    out: str | None = None
    opset: int | None = None
    include_normalization: bool = False

    def __post_init__(self) -> None:
        if self.format not in _SUFFIXES:
            raise ValueError(f"format must be one of {', '.join(_SUFFIXES)}; got {self.format!r}")
        if self.opset is not None and self.format != "onnx":
            raise ValueError(f"opset={self.opset} is for --format onnx only, and the format is {self.format}")
        if self.opset is not None and self.opset not in _OPSETS:
            raise ValueError(f"opset must be from {_OPSETS[0]} to {_OPSETS[-1]}, got {self.opset}")

    def file(self) -> Path:
        """The file that is written."""
        checkpoint = Path(self.checkpoint)
        return checkpoint.with_name(checkpoint.stem + _SUFFIXES[self.format]) if self.out is None else Path(self.out)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that has been written.

    Attributes:
        path: of it.
        format: of it.
        bytes: its size.
        difference: the largest one between the scores of the file and of the trained network on real images, relative to
            the largest score.
        images_from: which images.
        batches: how many of them at a time.
    """

    path: Path
    format: Format
    bytes: int
    difference: float
    images_from: str
    batches: tuple[int, ...]

    def __str__(self) -> str:
        """One line.

        >>> print(Exported(path=Path("n.onnx"), format="onnx", bytes=2**20, difference=3e-7, images_from="A", batches=(1, 3)))
        n.onnx (onnx, 1.0 MiB): scores as trained up to 3e-07 of the largest one, on A, 1 and 3 at a time
        """
        sizes = " and ".join(map(str, self.batches))
        return (
            f"{self.path} ({self.format}, {self.bytes / 2**20:.1f} MiB): scores as trained up to {self.difference:.0e} of the "
            f"largest one, on {self.images_from}, {sizes} at a time"
        )


def export_checkpoint(config: ExportConfig) -> Exported:
    """Fold the network of a checkpoint, write it in another format, and compare the file with the network as trained.

    The file takes any number of images at a time, of a segmenter of any size, of a detector one image; its convolutions are
    plain ones. Nothing is written unless the file says what the trained network says of real images.

    Raises:
        ValueError: a checkpoint that cannot be used, an extra that is not installed, a network that the format cannot hold,
            other scores than the trained network's, a full disk.
    """
    path = _writable(config)
    if config.format == "onnx":
        require_onnx()
    trained = load_trained(config.checkpoint, "cpu")
    task = trained.config.task
    kind = EXPORTABLE[task]
    if config.format not in kind.formats:
        raise ValueError(
            f"{config.checkpoint} is a checkpoint of task={task}: --format {config.format} cannot hold its networks, "
            f"{' and '.join(kind.formats)} can"
        )
    content, run = _in_format(config, trained, kind)
    batches, images_from = kind.real(trained)
    difference = largest_difference(run, trained, batches, include_normalization=config.include_normalization)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the exported network gives other scores than {config.checkpoint}: they differ by {difference:.2g} of the "
            f"largest one on {images_from}, where {TOLERANCE:g} is allowed; nothing was written"
        )
    _write(path, content)
    return Exported(
        path=path,
        format=config.format,
        bytes=len(content),
        difference=difference,
        images_from=images_from,
        batches=(1,) if task == "detect" else BATCHES,
    )


@torch.no_grad()
def largest_difference(run: Run, trained: Trained, batches: Sequence[Tensor], *, include_normalization: bool) -> float:
    """The largest difference between scores, relative to the largest one; of detectors, as `detection_difference` has it.

    Args:
        run: the exported network.
        trained: the network as trained.
        batches: uint8, as `EXPORTABLE` has them.
        include_normalization: whether `run` takes images scaled to [0, 1].

    Raises:
        ValueError: the trained network's own scores are not finite, or a detector finds nothing in these images.
    """
    kind = EXPORTABLE[trained.config.task]
    differences = []
    for batch in batches:
        images = kind.prepared(trained.model, batch, trained.statistics)
        expected = kind.call(trained.model, images)
        if not all(bool(tensor.isfinite().all()) for tensor in tree_leaves(expected)):
            raise ValueError(f"the scores of {trained.path} itself are not finite: export an earlier checkpoint")
        given = kind.prepared(trained.model, batch, UNSCALED) if include_normalization else images
        try:
            found = run(given)
        except (RuntimeError, AssertionError) as error:  # a graph that assumes sizes
            raise ValueError(
                f"the exported network does not take an input of {list(given.shape)} ({first_line(error)}): use --format torch"
            ) from error
        differences.append(kind.difference(trained, expected, found))
    told = [difference for difference in differences if difference is not None]
    if not told:
        raise ValueError(
            f"{trained.path} finds no object in {len(batches)} images, so that a file cannot be checked: export a checkpoint "
            "that has learned more"
        )
    return float(torch.tensor(told).max())  # NaN if one is


def _in_format(config: ExportConfig, trained: Trained, kind: Exportable) -> tuple[bytes, Run]:
    """The content of the file, and the network that it holds when it is read again."""
    facts = about(trained, normalization_included=config.include_normalization)
    folded = folded_plain(trained.model, example_input(trained.config, trained.model))
    part = folded if config.format == "torch" else kind.graph(folded)
    includes = config.include_normalization and trained.config.task != "detect"  # which do it themselves
    model = with_normalization(part, trained.statistics) if includes else part
    if config.format == "torch":
        content = folded_bytes(model, facts, trained)
        return content, partial(kind.call, run_folded(content))
    example = kind.example(trained)
    if trained.config.task == "detect":
        content = detector_onnx_bytes(model, example, facts, opset=config.opset)
        return content, run_onnx(content)
    program = traced(model, example, name=facts.model, free=kind.free)
    if config.format == "exported_program":
        content = program_bytes(program, facts)
        return content, run_program(content)
    content = onnx_bytes(program, facts, opset=config.opset, free=kind.free, input_name=kind.input_name)
    return content, run_onnx(content)


def _writable(config: ExportConfig) -> Path:
    """The file to write, found out before the work is done."""
    path = config.file()
    if path.is_dir():
        raise ValueError(
            f"--out {path} is a folder: name a file in it, such as {path / ('model' + _SUFFIXES[config.format])}"
        )
    if path.resolve() == Path(config.checkpoint).resolve():
        raise ValueError(f"--out {path} is the checkpoint itself: name another file")
    return path


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {reason(error)}; what was there before is unchanged") from error
