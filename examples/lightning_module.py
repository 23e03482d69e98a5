"""A LightningModule with the exact micro-batch step: `python examples/lightning_module.py`.

Manual optimization, `batchless.batched` around the dataloader, and `accumulated_step` in `training_step`; everything else is
Lightning's.
"""

import argparse
from collections.abc import Sequence

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import batchless as bl
from batchless.adapters.lightning import accumulated_step
from batchless.data.handwriting import Split, handwriting
from batchless.models import build_model

MicroBatch = tuple[Tensor, Tensor]


class Classifier(lightning.LightningModule):
    """A small network, converted to a normalizer."""

    def __init__(self, normalizer: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        example = torch.zeros(1, 3, 32, 32)
        self.model, _ = bl.convert(build_model("cifar_resnet8", num_classes=10), normalizer, example=example)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer of the module's parameters."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def training_step(self, micro_batches: list[MicroBatch], batch_idx: int) -> None:
        """One optimizer step."""
        with accumulated_step(self, clip=bl.AGC(0.1)) as step:
            for images, labels in micro_batches:
                step.backward(cross_entropy(self.model(images), labels), samples=len(images))

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Evaluation is as in any module."""
        images, labels = batch
        right = (self.model(images).argmax(dim=1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(images), prog_bar=True)


def digits(split: Split, count: int) -> TensorDataset:
    """The first `count` embedded images, scaled to about [-1, 1], and their labels."""
    data = handwriting(split)
    return TensorDataset(data.images[:count] / 127.5 - 1, torch.tensor(data.labels[:count]))


def main(arguments: Sequence[str] | None = None) -> float:
    """Train on the embedded handwriting; the share of test images that the network gets right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--normalizer", default="gn+ws")
    parser.add_argument("--images_per_forward", type=int, default=1)
    parser.add_argument("--images_per_step", type=int, default=16)
    parser.add_argument("--images", type=int, default=3000, help="training images in an epoch")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args(arguments)

    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(digits("train", options.images), options.images_per_forward, shuffle=True)
    steps = bl.batched(loader, options.images_per_step // options.images_per_forward)
    trainer = lightning.Trainer(max_epochs=options.epochs, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(options.normalizer), steps, DataLoader(digits("test", 500), batch_size=100))
    return float(trainer.callback_metrics["accuracy"])


if __name__ == "__main__":
    main()
