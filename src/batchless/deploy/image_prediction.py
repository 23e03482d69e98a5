"""What a trained classifier says about images of the user's."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from batchless.data.folders import read_image
from batchless.deploy.images import as_evaluated, network_input
from batchless.deploy.question import PredictConfig, Prediction, image_files, require_top
from batchless.nn.standardized import standardized
from batchless.tasks import Trained

_IMAGES_PER_FORWARD = 32


def answer_of_images(trained: Trained, config: PredictConfig) -> list[Prediction]:
    """The likeliest classes of the images asked about."""
    if config.pictures is not None:
        raise ValueError(
            f"pictures are drawn of objects, label maps and clips; {config.checkpoint} tells classes: leave --pictures out"
        )
    return list(predict_images(trained, image_files(config.images), top=config.top, device=config.device))


@torch.no_grad()
def predict_images(
    trained: Trained, paths: Iterable[str | Path], *, top: int = 3, device: str = "cpu"
) -> Iterator[Prediction]:
    """The likeliest classes of each image, in order, prepared as the run's evaluation does.

    Args:
        trained: whose model, on `device` and in evaluation mode.
        paths: image files; read some at a time, while their predictions are taken.
        top: how many classes.
        device: where the images go.

    Raises:
        ValueError: `top` is not 1 or more. An image that cannot be read gets a prediction with an `error`.
    """
    require_top(top)
    remaining = iter(paths)
    with standardized(trained.model):
        while chunk := list(islice(remaining, _IMAGES_PER_FORWARD)):
            squares: list[Tensor | str] = [_square(path, trained) for path in chunk]
            readable = [square for square in squares if isinstance(square, Tensor)]
            found = iter(_likeliest(trained, torch.stack(readable), top, device) if readable else ())
            for path, square in zip(chunk, squares, strict=True):
                if isinstance(square, str):
                    yield Prediction(file=str(path), error=square)
                else:
                    yield Prediction(file=str(path), classes=next(found))


def _square(path: str | Path, trained: Trained) -> Tensor | str:
    try:
        return as_evaluated(read_image(path), trained)
    except ValueError as error:
        return str(error)


def _likeliest(trained: Trained, squares: Tensor, top: int, device: str) -> Iterator[tuple[tuple[str, float], ...]]:
    scores = trained.model(network_input(squares, trained).to(device)).float()
    best = scores.softmax(1).topk(min(top, len(trained.classes)), dim=1)
    for probabilities, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield tuple((trained.classes[label], share) for label, share in zip(labels, probabilities, strict=True))
