"""What a trained network says about images of the user's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchless.deploy.question import PredictConfig, Prediction
from batchless.deploy.tasks import AT_WORK
from batchless.runs.atomic import write_text
from batchless.tasks import load_trained

if TYPE_CHECKING:
    from rich.table import Table


def predict_checkpoint(config: PredictConfig) -> list[Prediction]:
    """The predictions for the images, in their order; also written to `config.out`.

    Raises:
        ValueError: a checkpoint that cannot be used, or a folder without images; an unreadable image is told in its place.
    """
    trained = load_trained(config.checkpoint, config.device)
    predictions = AT_WORK[trained.config.task].predict(trained, config)
    if config.out is not None:
        write_text(Path(config.out), "".join(f"{json.dumps(_plain(prediction))}\n" for prediction in predictions))
    return predictions


def prediction_table(predictions: Sequence[Prediction]) -> "Table":
    """File, class and probability, a line for each class, for the terminal; of a detector the boxes too."""
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "class")
    detects = any(prediction.objects is not None for prediction in predictions)
    maps = any(prediction.areas is not None for prediction in predictions)
    table.add_column("score" if detects else "share of pixels" if maps else "probability", justify="right")
    if detects:
        table.add_column("left, top, right, bottom", justify="right")
    for prediction in predictions:
        if prediction.error is not None:
            table.add_row(Text(prediction.file), Text(prediction.error, style="red"), "")
        for rank, (name, probability) in enumerate(
            prediction.areas or prediction.classes
        ):  # Text: square brackets are no markup
            table.add_row(Text("" if rank else prediction.file), Text(name), f"{100 * probability:.1f} %")
        for rank, item in enumerate(prediction.objects or ()):
            box = ", ".join(f"{value:.0f}" for value in item.box)
            table.add_row(Text("" if rank else prediction.file), Text(item.name), f"{item.score:.2f}", box)
        if prediction.error is None and prediction.objects == ():
            table.add_row(Text(prediction.file), "nothing", "")
    return table


def _plain(prediction: Prediction) -> dict[str, object]:
    if prediction.error is not None:
        return {"file": prediction.file, "error": prediction.error}
    if prediction.objects is not None:
        objects = [{"class": item.name, "score": item.score, "box": list(item.box)} for item in prediction.objects]
        return {"file": prediction.file, "objects": objects}
    if prediction.areas is not None:
        return {"file": prediction.file, "areas": [{"class": name, "share": share} for name, share in prediction.areas]}
    classes = [{"class": name, "probability": share} for name, share in prediction.classes]
    return {"file": prediction.file, "predictions": classes}
