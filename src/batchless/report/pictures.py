"""Sample predictions of the runs, their pictures as data URIs: few, small, and from the run folder only."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchless.report.optional import read_optional
from batchless.runs import Run, number
from batchless.runs.atomic import reason

FOLDER, FILE = "pictures", "predictions.json"
KINDS = ("worst", "typical")
MOST_EACH = 6  # predictions of one kind shown of one run
MOST_RUNS = 16
MOST_BYTES = 256 * 1024  # of one picture
MOST_BYTES_IN_ALL = 6 * 1024**2
_TYPES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image that was predicted.

    Attributes:
        kind: `worst` (most sure of a wrong class) or `typical`.
        truth: its class.
        predicted: what the network said.
        confidence: how sure it was of that, or how right it was, 0 to 1.
        measure: what `confidence` measures, such as F1; empty where it is a probability.
        source: where the image is from.
        uri: the picture itself.
    """

    kind: str
    truth: str
    predicted: str
    confidence: float
    measure: str
    source: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Predictions of one run."""

    run: Run
    predictions: tuple[Prediction, ...]

    @property
    def large(self) -> bool:
        """Whether the pictures are scenes to be looked into."""
        return any(prediction.measure for prediction in self.predictions)

    def kind(self, kind: str) -> list[Prediction]:
        """Those of one kind."""
        return [prediction for prediction in self.predictions if prediction.kind == kind]


def read_galleries(runs: Sequence[Run]) -> tuple[list[Gallery], list[str]]:
    """Return the predictions of the first run of each cell that has any, and one line for each thing left out."""
    galleries: list[Gallery] = []
    notes: list[str] = []
    seen: set[tuple[object, object]] = set()
    left = MOST_BYTES_IN_ALL
    for run in runs:
        cell = (run.config["normalizer"], run.config["images_per_forward"])
        if cell in seen:
            continue
        try:
            entries = read_optional(run.path / FOLDER / FILE)
        except ValueError as error:
            notes.append(f"{error}: its predictions are left out")
            continue
        if entries is None:
            continue
        if len(galleries) == MOST_RUNS:
            notes.append(f"predictions are shown for {MOST_RUNS} combinations; the others are left out")
            break
        predictions, troubles = _predictions(run, entries, left=left)
        notes += troubles
        if predictions:
            seen.add(cell)
            left -= sum(len(prediction.uri) for prediction in predictions)
            galleries.append(Gallery(run=run, predictions=tuple(predictions)))
    return galleries, notes


def _predictions(run: Run, entries: Any, *, left: int) -> tuple[list[Prediction], list[str]]:
    file = run.path / FOLDER / FILE
    if not isinstance(entries, list):
        return [], [f"{file} holds no list: its predictions are left out"]
    predictions: list[Prediction] = []
    notes = []
    for index, entry in enumerate(entries):
        try:
            kind = entry["kind"]
            if kind not in KINDS:
                raise ValueError(f"its kind is {kind!r}, not one of {', '.join(KINDS)}")
            if sum(prediction.kind == kind for prediction in predictions) == MOST_EACH:
                continue
            prediction = _prediction(entry, kind, folder=run.path / FOLDER)
        except ValueError as error:
            notes.append(f"{file}, entry {index + 1} is left out: {error}")
        except (KeyError, TypeError):
            notes.append(f"{file}, entry {index + 1} is left out: it is not as batchless writes it")
        else:
            if len(prediction.uri) > left:
                notes.append(
                    f"{file}, entry {index + 1} and after are left out: the pictures would make the page too large"
                )
                break
            left -= len(prediction.uri)
            predictions.append(prediction)
    return predictions, notes


def _prediction(entry: Any, kind: str, *, folder: Path) -> Prediction:
    confidence = number(entry["confidence"])
    if confidence is None or not 0 <= confidence <= 1:
        raise ValueError(f"its confidence is {entry['confidence']!r}, not a share from 0 to 1")
    return Prediction(
        kind=kind,
        truth=str(entry["truth"]),
        predicted=str(entry["predicted"]),
        confidence=confidence,
        measure=str(entry.get("measure", "")),
        source=str(entry["source"]),
        uri=_data_uri(folder, entry["picture"]),
    )


def _data_uri(folder: Path, name: object) -> str:
    """Return the picture `name`; ValueError if it is not a small PNG or JPEG file in `folder`, links followed."""
    if not isinstance(name, str) or name != Path(name).name:
        raise ValueError(f"its picture {name!r} is not the name of a file in {folder}")
    try:
        file = (folder / name).resolve()
        if not file.is_relative_to(folder.parent.resolve()) or not file.is_file():
            raise FileNotFoundError("no file of that name in the run folder")
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"its picture {name!r} cannot be read: {reason(error)}") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"its picture {name!r} is larger than {MOST_BYTES // 1024} KiB")
    for magic, kind in _TYPES:
        if content.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    raise ValueError(f"its picture {name!r} is neither PNG nor JPEG")
