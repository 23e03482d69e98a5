"""From a checkpoint to a file for deployment, checked against the network that was trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from batchless.data.statistics import ChannelStatistics, normalized
from batchless.deploy.folded import about, folded_bytes, folded_plain, run_folded, with_normalization
from batchless.deploy.formats import Run, onnx_bytes, program_bytes, require_onnx, run_onnx, run_program, traced
from batchless.deploy.images import real_squares
from batchless.deploy.tasks import AT_WORK
from batchless.runs.atomic import reason, replacing
from batchless.tasks import Trained, load_trained

Format = Literal["torch", "onnx", "exported_program"]

TOLERANCE = 1e-3
"""Largest difference allowed, relative to the largest score. Rounding gives 1e-7 to 1e-5, a wrong weight 1e-1."""

_SUFFIXES: dict[Format, str] = {"torch": ".folded.pt", "onnx": ".onnx", "exported_program": ".pt2"}
_BATCHES = (1, 3)
_OPSETS = range(18, 26)
"""What torch's exporter writes, and converts to."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `batchless export` writes.

    Attributes:
        checkpoint: of a run.
        format: `onnx`; `exported_program`, a `.pt2` that `torch.export.load` reads; `torch`, a state dict that
            `batchless.deploy.load_folded` reads.
        out: the file, which is replaced if it is there; None: beside the checkpoint.
        opset: of `onnx`, 18 to 25; None: what torch chooses.
        include_normalization: whether the network normalizes images itself, and takes them scaled to [0, 1].
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

    The file's input is `[N, 3, S, S]` for any N; its convolutions are plain ones. Nothing is written unless the file gives
    the same scores as the trained network.

    Raises:
        ValueError: a checkpoint that cannot be used, an extra that is not installed, a network that the format cannot hold,
            other scores than the trained network's, a full disk.
    """
    path = _writable(config)
    if config.format == "onnx":
        require_onnx()
    trained = load_trained(config.checkpoint, "cpu")
    if not AT_WORK[trained.config.task].exported:
        raise ValueError(
            f"{config.checkpoint} is a checkpoint of task={trained.config.task}: export writes classifiers; "
            "batchless.fold(model) gives any network in torch.nn layers"
        )
    size = trained.config.data.image_size
    model = folded_plain(trained.model, torch.zeros(2, 3, size, size))
    if config.include_normalization:
        model = with_normalization(model, trained.statistics)
    content, run = _in_format(config, trained, model)
    squares, images_from = real_squares(trained, sum(_BATCHES))
    difference = largest_difference(
        run, trained, torch.split(squares, list(_BATCHES)), include_normalization=config.include_normalization
    )
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
        batches=_BATCHES,
    )


@torch.no_grad()
def largest_difference(run: Run, trained: Trained, batches: Sequence[Tensor], *, include_normalization: bool) -> float:
    """The largest difference between scores, relative to the largest one.

    Args:
        run: the exported network.
        trained: the network as trained.
        batches: squares uint8 `[N, 3, S, S]`.
        include_normalization: whether `run` takes images scaled to [0, 1].

    Raises:
        ValueError: the trained network's own scores are not finite.
    """
    unscaled = ChannelStatistics(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    differences = []
    for squares in batches:
        images = normalized(squares, trained.statistics)
        expected = trained.model(images)
        if not expected.isfinite().all():
            raise ValueError(f"the scores of {trained.path} itself are not finite: export an earlier checkpoint")
        scores = run(normalized(squares, unscaled) if include_normalization else images)
        assert scores.shape == expected.shape
        largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        differences.append((scores - expected).abs().max() / largest)
    return float(torch.stack(differences).max())  # NaN if one is


def _in_format(config: ExportConfig, trained: Trained, model: nn.Module) -> tuple[bytes, Run]:
    """The content of the file, and the network that it holds when it is read again."""
    facts = about(trained, normalization_included=config.include_normalization)
    if config.format == "torch":
        content = folded_bytes(model, facts, trained=trained.model)
        return content, run_folded(content)
    size = facts.image_size
    program = traced(model, torch.zeros(2, 3, size, size), name=facts.model)
    if config.format == "exported_program":
        content = program_bytes(program, facts)
        return content, run_program(content)
    content = onnx_bytes(program, facts, opset=config.opset)
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
