"""A run's network where it is used, and images as it saw them in evaluation."""

import torch
from torch import Tensor

from batchless.data import ImageDataset, open_images
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


def real_squares(trained: Trained, count: int) -> tuple[Tensor, str]:
    """`count` squares uint8 `[count, 3, S, S]`, and where they are from: the run's test images, else the embedded ones.

    The embedded handwriting stands in where the run's data is not on this machine, or cannot be read.
    """
    root = trained.config.data.root
    try:
        return _spread(open_images(root, "test"), count, trained), "the run's test images"
    except ValueError:
        if root is None:
            raise
        return _spread(open_images(None, "test"), count, trained), "the embedded handwriting"


def _spread(images: ImageDataset, count: int, trained: Trained) -> Tensor:
    """Images evenly spread over the dataset; some come twice if it has fewer."""
    indices = [number * len(images) // count for number in range(count)]
    return torch.stack([as_evaluated(images.image(index), trained) for index in indices])
