"""Residual networks without normalization: as built, with SkipInit, with alpha and beta. `python -m studies.residual`.

For each seed: the variance of the signal after each block of the network as it is built, on images of noise, and the test
accuracy after a short training on the embedded handwriting; `bn` beside them. All settings are the same but the normalizer;
the learning rate is nobody's best.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from batchless.models import build_model
from batchless.nn.residual_block import ResidualBlock
from batchless.surgery import convert
from batchless.tasks import TrainConfig, run_training
from batchless.train import OptimizerSettings
from studies.figures import percent

NAMES = ("bn", "none+sws", "none(skip=skip-init)+sws", "none(skip=alpha-beta)+sws")


def variances(model: nn.Module, images: Tensor) -> list[float]:
    """Of the output of each residual block, over images, channels and positions."""
    found: list[float] = []
    blocks = [one for one in model.modules() if isinstance(one, ResidualBlock | resnet.BasicBlock | resnet.Bottleneck)]
    hooks = [
        one.register_forward_hook(lambda block, given, output: found.append(float(output.var()))) for one in blocks
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def at_the_start(network: str, name: str, seed: int) -> list[float]:
    """`variances` of the network as built, on 16 images of standard normal noise of 32x32."""
    torch.manual_seed(seed)
    images = torch.randn(16, 3, 32, 32)
    return variances(convert(build_model(network, num_classes=10), name, example=images)[0], images)


def accuracy(network: str, name: str, seed: int, images: int, rate: float, clipping: float | None) -> float | None:
    """Of a test after training on so many images; None: the loss did not stay finite."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=network,
            normalizer=name,
            images=images,
            images_per_forward=32,
            images_per_step=32,
            evaluations=1,
            seed=seed,
            out=str(Path(folder, "run")),
            threads=1,
            tensorboard=False,
            optimizer=OptimizerSettings(learning_rate=rate, adaptive_clipping=clipping),
        )
        try:
            return float(run_training(config).summary["test_accuracy"])
        except ValueError as error:
            if "NaN" in str(error) or "finite" in str(error):
                return None
            raise


def line(network: str, name: str, seeds: int, images: int, rate: float, clipping: float | None) -> str:
    """A row of the table."""
    starts = [at_the_start(network, name, seed) for seed in range(seeds)]
    after = [fmean(values) for values in zip(*starts, strict=True)]
    found = [accuracy(network, name, seed, images, rate, clipping) for seed in range(seeds)]
    done = [value for value in found if value is not None]
    spread = f"{min(after):.2f} to {max(after):.2f}"
    return f"| `{name}` | {after[0]:.2f} | {after[-1]:.2f} | {spread} | {percent(done)} | {len(done)} of {seeds} |"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", default="cifar_resnet14")
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--images", type=int, default=9000)
    words.add_argument("--learning_rate", type=float, default=0.4)
    words.add_argument("--adaptive_clipping", type=float, default=0.1)
    asked = words.parse_args()
    about = f"learning rate {asked.learning_rate}, adaptive clipping {asked.adaptive_clipping}, seeds 0 to {asked.seeds - 1}"
    print(f"{asked.model}, {asked.images} images, {about}\n")
    print("| | variance after the first block | after the last | smallest to largest | test accuracy, % | ended well |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for name in NAMES:
        print(
            line(asked.model, name, asked.seeds, asked.images, asked.learning_rate, asked.adaptive_clipping), flush=True
        )


if __name__ == "__main__":
    main()
