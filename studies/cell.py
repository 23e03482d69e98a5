"""One cell of a study, `batchless train`'s words and all micro-batches of a step together: `python -m studies.cell train ...`.

The arithmetic is `batchless train`'s (see `studies.together`), the time is not: images/s say nothing of micro-batches.
"""

import sys
from dataclasses import replace

import torch

from batchless.arguments import parse_arguments
from batchless.runs import RunFolder
from batchless.tasks.config import TrainConfig
from batchless.tasks.setup import set_up
from batchless.tasks.trained import build_converted, build_plain
from batchless.train.loop import train
from studies.together import together


def main() -> int:
    """Train as the words say; 2 if they or the data are wrong."""
    try:
        config = parse_arguments(sys.argv[1:])
        if not isinstance(config, TrainConfig):
            raise ValueError(f"a cell is a training: begin with the word train, got {sys.argv[1:2]}")
        _run(config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    setup = set_up(config)
    torch.manual_seed(config.seed)
    model = build_plain(config, num_classes=len(setup.classes))
    model = together(build_converted(config, model)[0], config.images_per_forward)
    settings = replace(config.loop_settings(device="cpu"), images_per_forward=config.images_per_step)
    with RunFolder.create(config.folder(), config=config.plain(), seed=config.seed) as run:
        train(model, setup.task, setup.data, settings, run)


if __name__ == "__main__":
    sys.exit(main())
