"""Accuracy and loss over any number of batches, and which images they come from."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PerImage:
    """Of each image, in order, `[N]` each, on the CPU.

    Attributes:
        loss: cross-entropy.
        predicted: the class with the highest score.
        confidence: its probability.
        correct: whether it is the label.
    """

    loss: Tensor
    predicted: Tensor
    confidence: Tensor
    correct: Tensor


@dataclass
class Accuracy:
    """Share of images whose highest score is their label's, and the mean cross-entropy."""

    parts: list[Tensor] = field(default_factory=list)

    def update(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Add images `[N, 3, S, S]` and labels `[N]`."""
        images, labels = batch
        scores = model(images).float()
        confidence, predicted = scores.softmax(1).max(1)
        loss = F.cross_entropy(scores, labels, reduction="none")
        # One tensor on the device: nothing is waited for until `compute`. Classes below 2^24 are exact in float32.
        self.parts.append(torch.stack([loss, predicted.float(), confidence, (predicted == labels).float()]))

    def merge(self, later: "Accuracy") -> None:
        """Add the images of `later`, which come after this one's."""
        self.parts = [part.cpu() for part in (*self.parts, *later.parts)]

    def per_image(self) -> PerImage:
        """What was found for each image."""
        loss, predicted, confidence, correct = (
            torch.cat([part.cpu() for part in self.parts], 1) if self.parts else torch.zeros(4, 0)
        )
        return PerImage(loss=loss, predicted=predicted.long(), confidence=confidence, correct=correct.bool())

    def compute(self) -> dict[str, float]:
        """`accuracy` from 0 to 1, and `loss`."""
        found = self.per_image()
        count = max(len(found.loss), 1)
        return {"accuracy": float(found.correct.sum()) / count, "loss": float(found.loss.double().sum()) / count}
