"""What was published on the full data sets, for the tables of the study of tasks; no number here is ours.

Sources: the READMEs of joe-siyuan-qiao/maskrcnn-benchmark (Faster and Mask R-CNN), chenxi116/DeepLabv3.pytorch and
joe-siyuan-qiao/Batch-Channel-Normalization (DeepLabV3), the figure in the README of joe-siyuan-qiao/WeightStandardization (read
off its bars), and the first version of mmdetection's port. The paper's own tables were not to be had.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_README = "authors' README"
_FIGURE = "authors' figure, read off its bars"
_PORT = "mmdetection's port"


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        network: what was trained.
        normalizer: by our names.
        figures: in percent, in the order of the table's columns; None: not given.
        source: who measured it.
    """

    network: str
    normalizer: str
    figures: tuple[float | None, ...]
    source: str


@dataclass(frozen=True)
class PublishedTable:
    """What was published for a task: on which data, by what it was judged, and the results; none: none is known to us."""

    data: str
    words: tuple[str, ...] = ()
    rows: tuple[Published, ...] = ()


PUBLISHED: Mapping[str, PublishedTable] = {
    "camvid": PublishedTable(
        "PASCAL VOC 2012, validation images",
        ("mIoU",),
        (
            Published("DeepLabV3, ResNet-101", "bn", (76.49,), _README),
            Published("DeepLabV3, ResNet-101", "gn+ws", (77.20,), _README),
            Published("DeepLabV3, ResNet-101", "bcn+ws", (78.10,), _README),
        ),
    ),
    "clips": PublishedTable("Something-Something V1 (TSM on ResNet-50)"),
    "bccd": PublishedTable(
        "COCO, val2017",
        ("box AP",),
        (
            Published("Faster R-CNN, R-50, 1x", "gn+ws", (39.36,), _README),
            Published("Faster R-CNN, R-101, 1x", "gn+ws", (41.32,), _README),
            Published("Faster R-CNN, X-50, 1x", "gn+ws", (40.25,), _README),
            Published("Faster R-CNN, X-101, 1x", "gn+ws", (41.90,), _README),
            Published("Faster R-CNN, R-50, 1x", "gn", (37.8,), _PORT),
            Published("Faster R-CNN, R-50, 1x", "gn+ws", (38.9,), _PORT),
            Published("Faster R-CNN, R-101, 1x", "gn", (39.8,), _PORT),
            Published("Faster R-CNN, R-101, 1x", "gn+ws", (41.4,), _PORT),
        ),
    ),
    "coco128": PublishedTable(
        "COCO, val2017",
        ("box AP", "mask AP"),
        (
            Published("Mask R-CNN, R-50, 2x", "gn+ws", (40.81, 36.51), _README),
            Published("Mask R-CNN, R-101, 2x", "gn+ws", (42.73, 37.92), _README),
            Published("Mask R-CNN, X-50, 2x", "gn+ws", (42.00, 37.28), _README),
            Published("Mask R-CNN, X-101, 2x", "gn+ws", (43.12, 38.34), _README),
            Published("Mask R-CNN, R-50", "bn", (None, 34.50), _FIGURE),
            Published("Mask R-CNN, R-50", "gn", (None, 35.80), _FIGURE),
            Published("Mask R-CNN, R-101", "bn", (None, 36.40), _FIGURE),
            Published("Mask R-CNN, R-101", "gn", (None, 36.80), f"{_FIGURE}; it is hatched above 35.7, unexplained"),
            Published("Mask R-CNN, R-50, 2x", "gn", (39.9, 36.0), _PORT),
            Published("Mask R-CNN, R-50, 2x", "gn+ws", (40.3, 36.2), _PORT),
            Published("Mask R-CNN, R-101, 2x", "gn", (41.6, 37.3), _PORT),
            Published("Mask R-CNN, R-101, 2x", "gn+ws", (42.0, 37.3), _PORT),
        ),
    ),
}
"""By the name of the problem that stands for the full data set here."""


def published_table(table: PublishedTable) -> list[str]:
    """The lines of a Markdown table of its own, under words that keep it apart from what was measured here."""
    if not table.rows:
        return [f"Published on {table.data}: no number is known to us.", ""]
    return [
        f"Published on {table.data}: other data, larger networks, weights from ImageNet where it is said; not measured here:",
        "",
        f"| network | normalizer | {' | '.join(table.words)} | source |",
        f"|---|---|{'---:|' * len(table.words)}---|",
        *(_row(row) for row in table.rows),
        "",
    ]


def _row(row: Published) -> str:
    figures = ["" if figure is None else f"{figure:.1f}" for figure in row.figures]
    return f"| {' | '.join([row.network, f'`{row.normalizer}`', *figures, row.source])} |"
