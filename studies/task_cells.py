"""The cells of the study of tasks (`studies.tasks`): one model for each task, each with every normalizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NORMALIZERS: tuple[tuple[str, int], ...] = (("bn", 2), ("gn", 1), ("gn+ws", 1), ("bcn-micro+ws", 1), ("frozen-bn", 1))
"""Name and images per forward."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is trained for a task, the same for every normalizer.

    Attributes:
        name: of the data.
        folder: of the data below the folder of all; None: the embedded sample.
        about: for the table.
        caution: what the table does not show, below it.
        figures: what it is judged by, as `summary.json` names it, the main one first.
        images: seen in training in all.
        seeds: how many.
        seconds: of a cell's whole command on one of two busy cores, which counts until cells have ended.
        settings: what `batchless train` is told.
    """

    name: str
    folder: str | None
    about: str
    caution: str
    figures: tuple[str, ...]
    images: int
    seeds: int
    seconds: float
    settings: Mapping[str, Any]


PROBLEMS: Mapping[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem(
            name="camvid",
            folder="camvid",
            about="CamVid, LR-ASPP on MobileNetV3, 160x120, 8 images per step",
            caution="LR-ASPP has no normalization on its pooled map; in DeepLabV3 `bn` at two images would see two values "
            "of each channel there. DeepLabV3 on ResNet-18 was too slow for this study. Of 367 images the last of an epoch is "
            "alone in its forward for `bn` as well.",
            figures=("miou", "pixel_accuracy"),
            images=10 * 367,
            seeds=2,
            seconds=450.0,
            settings={"config": "camvid_lraspp", "evaluations": 2},
        ),
        Problem(
            name="clips",
            folder=None,
            about="the embedded motion clips, TSM on ResNet-18 with a 3x3 stem, 16 pixels, 4 clips per step",
            caution="Six classes: chance is 16.7 %. An image is a clip of 8 frames. Optimizer and rate (AdamW, 0.0005) are "
            "those of a trial with `gn+ws`; SGD learned nothing in this budget (docs/log.md).",
            figures=("accuracy",),
            images=1600,
            seeds=2,
            seconds=250.0,
            settings={
                "config": "embedded_clips",
                "model": "tsm:resnet18_32",
                "images_per_step": 4,
                "optimizer.name": "adamw",
                "optimizer.learning_rate": 0.0005,
                "evaluations": 1,
            },
        ),
        Problem(
            name="bccd",
            folder="bccd",
            about="BCCD, Faster R-CNN on ResNet-18 FPN, 256 pixels, 2 images per step",
            caution="One seed: no difference has an interval.",
            figures=("ap", "ap50"),
            images=4 * 292,
            seeds=1,
            seconds=420.0,
            settings={"config": "bccd_fasterrcnn_resnet18", "evaluations": 2},
        ),
        Problem(
            name="coco128",
            folder="coco128",
            about="COCO128 (96 images for training, 32 for test), Mask R-CNN on ResNet-18 FPN, 256 pixels, 2 images per step",
            caution="A trial of everything, no result: AP is a mean over classes, and 96 training and 32 test images hold "
            "most of the 80 classes a few times or never.",
            figures=("ap", "ap50", "mask_ap"),
            images=6 * 96,
            seeds=1,
            seconds=350.0,
            settings={"config": "coco128_maskrcnn_resnet18"},
        ),
    )
}


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    problem: str
    normalizer: str
    images_per_forward: int
    seed: int

    @property
    def name(self) -> str:
        """The run folder's name."""
        return f"{self.problem}-{self.normalizer}-{self.images_per_forward}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """What `batchless train` is told, but where the data and the run folder are."""
        problem = PROBLEMS[self.problem]
        return dict(problem.settings) | {
            "normalizer": self.normalizer,
            "images_per_forward": self.images_per_forward,
            "images": problem.images,
            "seed": self.seed,
            "threads": 1,
            "tensorboard": "false",
        }


def cells(problems: tuple[str, ...] = tuple(PROBLEMS)) -> Iterator[Cell]:
    """Those of the named problems, in the order of their worth: every question once before any is asked again."""
    for seed in range(max(PROBLEMS[name].seeds for name in problems)):
        for name in problems:
            if seed < PROBLEMS[name].seeds:
                for normalizer, size in NORMALIZERS:
                    yield Cell(name, normalizer, size, seed)
