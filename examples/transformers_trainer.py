"""Hugging Face's Trainer with the exact micro-batch step: `python examples/transformers_trainer.py`.

The model is made from a configuration, nothing is downloaded; a pretrained one is converted in the same way.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import batchless as bl
from batchless.adapters.transformers import accumulated_training_step
from batchless.data.handwriting import Split, handwriting


class ExactTrainer(Trainer):
    """A Trainer whose optimizer steps are `batchless.accumulate`'s."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch."""
        return accumulated_training_step(self, model, inputs, clip=bl.AGC(0.1))


def digits(split: Split, count: int) -> list[dict[str, Any]]:
    """The first `count` embedded images, scaled to about [-1, 1], and their labels."""
    data = handwriting(split)
    images = data.images[:count] / 127.5 - 1
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, data.labels, strict=False)]


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """The share of images that the network gets right."""
    return {"accuracy": float((predicted.predictions.argmax(axis=1) == predicted.label_ids).mean())}


def main(arguments: Sequence[str] | None = None) -> float:
    """Train on the embedded handwriting; the share of test images that the network gets right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--normalizer", default="gn+ws")
    parser.add_argument("--images_per_forward", type=int, default=1)
    parser.add_argument("--images_per_step", type=int, default=16)
    parser.add_argument("--images", type=int, default=3000, help="training images in an epoch")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args(arguments)

    set_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    plain = ResNetForImageClassification(
        ResNetConfig(**sizes, layer_type="basic", num_labels=10, downsample_in_first_stage=False)
    )
    model, _ = bl.convert(plain, options.normalizer, example=torch.zeros(1, 3, 32, 32))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.images_per_forward,
            gradient_accumulation_steps=options.images_per_step // options.images_per_forward,
            num_train_epochs=options.epochs,
            max_grad_norm=0,  # the clipping is accumulated_training_step's
            optim="sgd",
            optim_args="momentum=0.9",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
        )
        train, test = digits("train", options.images), digits("test", 500)
        trainer = ExactTrainer(model, settings, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
        trainer.train()
        return float(trainer.evaluate()["eval_accuracy"])


if __name__ == "__main__":
    main()
