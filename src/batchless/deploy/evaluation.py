"""How good a trained network is on test images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchless.deploy.tasks import AT_WORK
from batchless.runs.atomic import write_text
from batchless.runs.folder import strict_json
from batchless.tasks import load_trained

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Which test images.

    Attributes:
        root: folder of a dataset in any known layout, with the classes of the run; None: the run's own test images.
        workers: processes that prepare batches; 0: this one.
    """

    root: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 or more, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `batchless evaluate` evaluates.

    Attributes:
        checkpoint: of a run.
        data: which test images.
        device: cpu or cuda.
        out: JSON file to write; None: none.
    """

    checkpoint: str
    data: EvaluationData = field(default_factory=EvaluationData)
    device: str = "cpu"
    out: str | None = None


def evaluate_checkpoint(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate as the run did while training: in its precision, with its preparation of images.

    Returns:
        `task`, and what `evaluate_images`, `evaluate_clips`, `evaluate_detector` or `evaluate_segmenter` gives. Also
        written to `config.out`.

    Raises:
        ValueError: a checkpoint or a dataset that cannot be used, or one with other classes.
    """
    trained = load_trained(config.checkpoint, config.device)
    task = trained.config.task
    measure = AT_WORK[task].evaluate
    found = measure(trained, config.data.root, workers=config.data.workers, device=config.device)
    result = {"task": task, **found}
    if config.out is not None:
        write_text(Path(config.out), strict_json(result, indent=1))
    return result


def evaluation_tables(result: dict[str, Any]) -> "Group":
    """The result of `evaluate_checkpoint` for the terminal: all figures, and those of each class."""
    return AT_WORK[result["task"]].tables(result)
