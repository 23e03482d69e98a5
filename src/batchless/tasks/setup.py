"""Every task by its name; a new one is an entry here."""

from collections.abc import Mapping
from typing import Any

from batchless.tasks.classify_setup import CLASSIFICATION
from batchless.tasks.config import TaskName, TrainConfig
from batchless.tasks.detect.setup import DETECTION
from batchless.tasks.kind import Setup, TaskKind
from batchless.tasks.segment.setup import SEGMENTATION
from batchless.tasks.video.setup import VIDEO

TASKS: Mapping[TaskName, TaskKind] = {
    "classify": CLASSIFICATION,
    "detect": DETECTION,
    "segment": SEGMENTATION,
    "video": VIDEO,
}


def set_up(config: TrainConfig) -> Setup[Any]:
    """The configured task on the configured data.

    Raises:
        ValueError: data that is missing, damaged or of another kind, or settings that do not fit them.
    """
    return TASKS[config.task].set_up(config)
