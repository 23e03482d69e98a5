"""A run's network where it is used, and images as it saw them in evaluation."""

from torch import Tensor

from batchless.data.augment import centred
from batchless.data.statistics import normalized
from batchless.tasks import Trained


def as_evaluated(image: Tensor, trained: Trained) -> Tensor:
    """The square uint8 `[3, S, S]` that the run's evaluation takes from an image, not yet normalized."""
    data = trained.config.data
    return centred(image, data.image_size, resize_to=data.resize_shorter_side)


def network_input(squares: Tensor, trained: Trained) -> Tensor:
    """uint8 `[N, 3, S, S]` normalized as in training: float32."""
    return normalized(squares, trained.statistics)
