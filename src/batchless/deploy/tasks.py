"""What a trained network does by its task; a new task is an entry here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from batchless.deploy.classification import classification_tables, evaluate_clips, evaluate_images
from batchless.deploy.clip_prediction import answer_of_clips
from batchless.deploy.detection import answer_of_objects, detection_tables, evaluate_detector
from batchless.deploy.image_prediction import answer_of_images
from batchless.deploy.question import PredictConfig, Prediction
from batchless.deploy.segmentation import answer_of_maps, evaluate_segmenter, segmentation_tables
from batchless.tasks import Trained
from batchless.tasks.config import TaskName

if TYPE_CHECKING:
    from rich.console import Group


class Evaluate(Protocol):
    """Evaluates as the run did while training."""

    def __call__(self, trained: Trained, root: str | None, *, workers: int, device: str) -> dict[str, Any]:
        """The figures, on the data in `root` or on the run's own."""


@dataclass(frozen=True, kw_only=True)
class AtWork:
    """What the verbs do with a trained network of a task.

    Attributes:
        evaluate: its figures on test images.
        tables: these for the terminal.
        predict: what it says about images of the user's; an unreadable one is told in its place.
    """

    evaluate: Evaluate
    tables: "Callable[[dict[str, Any]], Group]"
    predict: Callable[[Trained, PredictConfig], list[Prediction]]


AT_WORK: Mapping[TaskName, AtWork] = {
    "classify": AtWork(evaluate=evaluate_images, tables=classification_tables, predict=answer_of_images),
    "detect": AtWork(evaluate=evaluate_detector, tables=detection_tables, predict=answer_of_objects),
    "segment": AtWork(evaluate=evaluate_segmenter, tables=segmentation_tables, predict=answer_of_maps),
    "video": AtWork(evaluate=evaluate_clips, tables=classification_tables, predict=answer_of_clips),
}
