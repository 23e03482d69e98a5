"""What a trained network says about clips of the user's."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from batchless.data.clip_loading import evaluated_clip
from batchless.data.clips import ClipFiles
from batchless.data.video_files import is_picture, is_video
from batchless.deploy.question import PredictConfig, Prediction
from batchless.models.video import clip_input
from batchless.nn.standardized import standardized
from batchless.runs.atomic import reason
from batchless.tasks import Trained
from batchless.tasks.video.pictures import Strips

Likeliest = tuple[tuple[str, float], ...]
"""Names and probabilities of classes, the likeliest first."""


def clip_paths(paths: Iterable[str | Path]) -> list[Path]:
    """The clips in order: video files, folders of frames, and for any other folder the video files directly in it, by name.

    Raises:
        ValueError: a folder with neither.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        names = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
        if not path.is_dir() or any(map(is_picture, names)):
            found.append(path)
            continue
        videos = [path / name for name in names if is_video(name)]
        if not videos:
            raise ValueError(f"{path}: neither a video file nor a picture directly in this folder; name the clips")
        found += videos
    return found


def answer_of_clips(trained: Trained, config: PredictConfig) -> list[Prediction]:
    """The likeliest classes of the clips asked about."""
    found = predict_clips(
        trained,
        clip_paths(config.images),
        top=config.top,
        device=config.device,
        pictures=None if config.pictures is None else Path(config.pictures),
    )
    return [
        Prediction(file=file, error=says) if isinstance(says, str) else Prediction(file=file, classes=says)
        for file, says in found
    ]


@torch.no_grad()
def predict_clips(
    trained: Trained, paths: Iterable[str | Path], *, top: int, device: str, pictures: Path | None = None
) -> Iterator[tuple[str, Likeliest | str]]:
    """Each clip, and the likeliest classes, or why it could not be read; prepared as the run's evaluation does.

    Args:
        trained: whose model, on `device` and in evaluation mode.
        paths: video files and folders of frames.
        top: how many classes.
        device: where the clips go.
        pictures: folder for a strip of frames of each clip, `<number>-<class>.png`; None: none.

    Raises:
        ValueError: the pictures cannot be written.
    """
    settings, sampling = trained.config.data, trained.config.video
    with standardized(trained.model):
        for number, path in enumerate(paths):
            clips = ClipFiles(files=((str(path), 0),), classes=trained.classes)
            try:
                looks, _ = evaluated_clip(
                    clips,
                    0,
                    sampling,
                    settings.image_size,
                    mean_std=trained.statistics,
                    resize_to=settings.resize_shorter_side,
                )
            except ValueError as error:
                yield str(path), str(error)
                continue
            scores = trained.model(clip_input(trained.model, looks.to(device))).float().mean(0)
            best = scores.softmax(0).topk(min(top, len(trained.classes)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            likeliest = tuple((trained.classes[label], share) for share, label in pairs)
            if pictures is not None:
                strips = Strips(
                    clips=clips,
                    sampling=sampling,
                    image_size=settings.image_size,
                    resize_to=settings.resize_shorter_side,
                )
                _write(strips, pictures, f"{number:03}-{likeliest[0][0]}.png")
            yield str(path), likeliest


def _write(strips: Strips, folder: Path, name: str) -> None:
    from PIL import Image

    safe = "".join(character if character.isalnum() or character in "-_. " else "_" for character in name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(strips.image(0).permute(1, 2, 0).numpy()).save(folder / safe)
    except OSError as error:
        raise ValueError(f"cannot write pictures into {folder}: {reason(error)}") from error
