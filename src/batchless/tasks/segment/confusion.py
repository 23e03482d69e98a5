"""Mean intersection over union (mIoU) from one confusion matrix, over any number of batches and processes."""

import zlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from batchless.data.label_maps import IGNORED
from batchless.data.map_loading import MapBatch
from batchless.models.segmenters import resized_scores

_LARGEST_SIDE = 320
"""Of a prediction that is kept to be pictured."""


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often each class was taken for which: int64 `[K, K]`, truth by row, prediction by column.

    Args:
        truth: integers of any shape, 0 to K - 1 or 255 (ignored, not counted).
        predicted: of that shape, 0 to K - 1.
        classes: K.
    """
    cells = torch.where(truth == IGNORED, classes * classes, truth.long() * classes + predicted.long())
    # One more cell for what is ignored; selecting pixels would wait for the device.
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=truth.device)
    counts.scatter_add_(0, cells.flatten(), torch.ones_like(counts[:1]).expand(cells.numel()))
    return counts[:-1].view(classes, classes)


def intersection_over_union(matrix: Tensor) -> Tensor:
    """`M_kk / (sum_j M_kj + sum_j M_jk - M_kk)` of each class, float64 `[K]`: NaN where a class is neither there nor predicted.

    Args:
        matrix: `M [K, K]`, of `confusion_matrix`.
    """
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return torch.where(union > 0, hits / union, torch.nan)


def mean_over_union(matrix: Tensor) -> float:
    """mIoU: the mean over the classes that are in the data or in the prediction; 0 if there is none."""
    known = intersection_over_union(matrix)
    known = known[~known.isnan()]
    return float(known.mean()) if len(known) else 0.0


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """What was predicted for an image.

    Attributes:
        index: of the image in the data set.
        miou: over the classes in the image or in its prediction.
        height: of the prediction as it is kept, at most 320, as the width.
        width: of it.
        labels: its bytes, compressed.
    """

    index: int
    miou: float
    height: int
    width: int
    labels: bytes

    def prediction(self) -> Tensor:
        """uint8 `[height, width]`."""
        values = torch.frombuffer(bytearray(zlib.decompress(self.labels)), dtype=torch.uint8)
        return values.view(self.height, self.width)


@dataclass
class Confusion:
    """The metric of segmentation: one confusion matrix over all pixels, and the summed cross-entropy.

    Attributes:
        classes: K.
        matrix: int64 `[K, K]`, where the batches are; None before the first.
        loss: float64, of all valid pixels; None before the first batch.
        mapped: of each image, in order.
    """

    classes: int
    matrix: Tensor | None = None
    loss: Tensor | None = None
    mapped: list[Mapped] = field(default_factory=list)

    def update(self, model: nn.Module, batch: MapBatch) -> None:
        """Add images; scores are resized to the size of the label maps."""
        scores = resized_scores(model(batch.images).float(), batch.labels.shape[-2:])
        predicted = scores.argmax(1)
        loss = F.cross_entropy(scores, batch.labels.long(), ignore_index=IGNORED, reduction="none").double().sum()
        for index, truth, labels in zip(batch.indices.tolist(), batch.labels, predicted, strict=True):
            matrix = confusion_matrix(truth, labels, self.classes)
            self.matrix = matrix if self.matrix is None else self.matrix + matrix
            self.mapped.append(_kept(index, mean_over_union(matrix), labels.to(torch.uint8).cpu()))
        self.loss = loss if self.loss is None else self.loss + loss

    def merge(self, later: "Confusion") -> None:
        """Add the images of `later`, which come after this one's."""
        self.matrix = self._matrix() + later._matrix()
        self.loss = torch.tensor(self._loss() + later._loss(), dtype=torch.float64)
        self.mapped += later.mapped

    def _matrix(self) -> Tensor:
        return torch.zeros(self.classes, self.classes, dtype=torch.int64) if self.matrix is None else self.matrix.cpu()

    def _loss(self) -> float:
        return 0.0 if self.loss is None else float(self.loss)

    def by_class(self) -> Tensor:
        """IoU of each class, float64 `[K]`; NaN where it is neither in the data nor predicted."""
        return intersection_over_union(self._matrix())

    def pixels(self) -> list[int]:
        """Valid pixels of each class."""
        return [int(count) for count in self._matrix().sum(1)]

    def compute(self) -> dict[str, float]:
        """`miou`, `pixel_accuracy`, both 0 to 1, and `loss`, the mean over the valid pixels."""
        matrix = self._matrix()
        count = max(int(matrix.sum()), 1)
        return {
            "miou": mean_over_union(matrix),
            "pixel_accuracy": int(matrix.diagonal().sum()) / count,
            "loss": self._loss() / count,
        }


def _kept(index: int, miou: float, labels: Tensor) -> Mapped:
    scale = min(_LARGEST_SIDE / max(labels.shape), 1.0)
    size = [max(round(side * scale), 1) for side in labels.shape]
    small = functional.resize(labels[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
    content = zlib.compress(small.contiguous().numpy().tobytes(), 1)
    return Mapped(index=index, miou=miou, height=size[0], width=size[1], labels=content)
