"""How good a trained network is on test images or clips: in all, for each class, and what it takes for what."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from batchless.data import ImageDataset, first_images, open_images
from batchless.data.clips import ClipDataset, ClipRelabelled, first_clips, open_clips
from batchless.tasks import Classify, ImageData, Trained
from batchless.tasks.accuracy import Accuracy, PerImage
from batchless.tasks.limits import limited
from batchless.tasks.video import ClassifyClips, ClipData
from batchless.tasks.video.accuracy import ClipAccuracy
from batchless.train import evaluate

if TYPE_CHECKING:
    from rich.console import Group

_CONFUSIONS = 10


def evaluate_images(trained: Trained, root: str | None, *, workers: int, device: str) -> dict[str, Any]:
    """Evaluate a classifier of images as its run did while training.

    Args:
        trained: on `device`.
        root: folder of another data set with the run's classes; None: the run's own test images.
        workers: processes that prepare images.
        device: where images go.

    Returns:
        `checkpoint`, `root` (None: the embedded handwriting), `images`, `accuracy` (0 to 1), `loss`; `per_class`, a list of
        `class`, `images`, `accuracy` (None without images); `confusions`, the ten most frequent ones: `truth`,
        `predicted`, `images`.

    Raises:
        ValueError: data that cannot be used, or with other classes.
    """
    return _figures(_of_images, trained, root, workers, device)


def evaluate_clips(trained: Trained, root: str | None, *, workers: int, device: str) -> dict[str, Any]:
    """The same of clips, with `top5` and the other figures of the run."""
    return _figures(_of_clips, trained, root, workers, device)


_Measured = tuple[list[int], PerImage, dict[str, float]]
"""Labels, what was found for each image or clip, and the metric's figures."""


def _figures(
    measure: "Callable[[Trained, str | None, int, str], _Measured]",
    trained: Trained,
    root: str | None,
    workers: int,
    device: str,
) -> dict[str, Any]:
    labels, found, measured = measure(trained, root, workers, device)
    used = trained.config.data.root if root is None else root
    figures = {"checkpoint": str(trained.path), "root": used, "images": len(labels), **measured}
    return figures | by_class(labels, found.predicted.tolist(), trained.classes)


def _of_images(trained: Trained, root: str | None, workers: int, device: str) -> _Measured:
    settings = trained.config.data
    images = open_images(settings.root if root is None else root, "test")
    if root is None:
        images = limited(images, settings.test_images, first_images, seed=0, name="test_images")
    images = with_classes(images, trained.classes)
    data = ImageData(
        train_images=images,
        test_images=images,
        image_size=settings.image_size,
        augment=None,
        resize_to=settings.resize_shorter_side,
        statistics=trained.statistics,
        seed=0,
        workers=workers,
    )
    metric = evaluate(trained.model, Classify(), data, device, precision=trained.config.precision)
    assert isinstance(metric, Accuracy)
    return [images.label(index) for index in range(len(images))], metric.per_image(), metric.compute()


def _of_clips(trained: Trained, root: str | None, workers: int, device: str) -> _Measured:
    settings = trained.config.data
    clips = open_clips(settings.root if root is None else root, "test")
    if root is None:
        clips = limited(clips, settings.test_images, first_clips, seed=0, name="test_images")
    clips = _clips_with_classes(clips, trained.classes)
    data = ClipData(
        train_clips=clips,
        test_clips=clips,
        image_size=settings.image_size,
        sampling=trained.config.video,
        augment=settings.augment(),
        statistics=trained.statistics,
        seed=0,
        resize_to=settings.resize_shorter_side,
        workers=workers,
    )
    metric = evaluate(trained.model, ClassifyClips(), data, device, precision=trained.config.precision)
    assert isinstance(metric, ClipAccuracy)
    return [clips.label(index) for index in range(len(clips))], metric.per_image(), metric.compute()


def by_class(labels: list[int], predicted: list[int], classes: tuple[str, ...]) -> dict[str, Any]:
    """`per_class` and `confusions` of `evaluate_checkpoint`; confusions equally frequent are in the order of the classes.

    >>> found = by_class([0, 0, 0, 1], [0, 1, 1, 1], ("cat", "dog", "owl"))
    >>> [(row["class"], row["images"], row["accuracy"]) for row in found["per_class"]]
    [('cat', 3, 0.3333333333333333), ('dog', 1, 1.0), ('owl', 0, None)]
    >>> found["confusions"]
    [{'truth': 'cat', 'predicted': 'dog', 'images': 2}]
    """
    pairs = Counter(zip(labels, predicted, strict=True))
    images = Counter(labels)
    per_class = [
        {
            "class": name,
            "images": images[label],
            "accuracy": pairs[label, label] / images[label] if images[label] else None,
        }
        for label, name in enumerate(classes)
    ]
    wrong = sorted((-count, truth, guess) for (truth, guess), count in pairs.items() if truth != guess)
    confusions = [
        {"truth": classes[truth], "predicted": classes[guess], "images": -count}
        for count, truth, guess in wrong[:_CONFUSIONS]
    ]
    return {"per_class": per_class, "confusions": confusions}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Relabelled:
    """A dataset whose classes are in another order."""

    dataset: ImageDataset
    classes: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Tensor:
        return self.dataset.image(index)

    def label(self, index: int) -> int:
        return self.labels[self.dataset.label(index)]

    def source(self, index: int) -> str:
        return self.dataset.source(index)


def with_classes(images: ImageDataset, classes: tuple[str, ...]) -> ImageDataset:
    """The dataset with its labels in the order of `classes`; ValueError if it has other classes, naming them."""
    if images.classes == classes:
        return images
    return _Relabelled(dataset=images, classes=classes, labels=_labels_among(images.classes, classes, images.source(0)))


def _clips_with_classes(clips: ClipDataset, classes: tuple[str, ...]) -> ClipDataset:
    if clips.classes == classes:
        return clips
    return ClipRelabelled(dataset=clips, classes=classes, labels=_labels_among(clips.classes, classes, clips.source(0)))


def _labels_among(found: tuple[str, ...], classes: tuple[str, ...], source: str) -> tuple[int, ...]:
    """The position of each class among the run's; ValueError if there are others."""
    others = [name for name in found if name not in classes]
    missing = [name for name in classes if name not in found]
    if others or missing:
        told = [
            f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for names, what in ((others, "that the run has not"), (missing, "of the run's missing"))
            if names
        ]
        raise ValueError(
            f"{source}: the dataset has other classes than the run: {'; '.join(told)}; name its folders as the "
            "run's classes are called"
        )
    return tuple(classes.index(name) for name in found)


def classification_tables(result: dict[str, Any]) -> "Group":
    """The result for the terminal: all figures, those of each class, and what is confused."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    classes, confusions = Table("class"), Table("truth", "taken for")  # Text: square brackets in names are no markup
    for title in ("images", "accuracy, %"):
        classes.add_column(title, justify="right")
    confusions.add_column("images", justify="right")
    for row in result["per_class"]:
        accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
        classes.add_row(Text(row["class"]), str(row["images"]), accuracy)
    for row in result["confusions"]:
        confusions.add_row(Text(row["truth"]), Text(row["predicted"]), str(row["images"]))
    clips = "top5" in result
    figures = f"accuracy {100 * result['accuracy']:.1f} %, loss {result['loss']:.3f}, on {result['images']} test "
    figures += f"clips (top-5 {100 * result['top5']:.1f} %) of " if clips else "images of "
    source = result["root"] or ("the embedded clips" if clips else "the embedded handwriting")
    return Group(
        Text(figures + source),
        classes,
        *([confusions] if result["confusions"] else []),
    )
