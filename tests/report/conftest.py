from pathlib import Path

import pytest

from batchless.runs import Run

MACHINE = {
    "started": "2026-01-01T10:20:30+00:00",
    "seed": 0,
    "cpu": "A CPU",
    "cores": 2,
    "gpu": None,
    "torch": "2.14.1",
    "git_commit": "abc123",
    "git_dirty": False,
}


@pytest.fixture
def make_run():
    """Make a run that was never run: `make_run("gn", 2, 0.7)`; a text for the accuracy is why it failed."""

    def make(normalizer, images_per_forward, accuracy, *, seed=0, curve=(), config=None, environment=None, **summary):
        if accuracy is None:
            ended = None
        elif isinstance(accuracy, str):
            ended = {"failed": accuracy}
        else:
            ended = {"test_accuracy": accuracy, "images_per_second": 100.0, "images": 1000, "seconds": 10.0, **summary}
        return Run(
            path=Path("runs") / f"{len(normalizer)}-{images_per_forward}-{seed}",
            config={
                "normalizer": normalizer,
                "images_per_forward": images_per_forward,
                "images_per_step": 32,
                "model": "resnet8",
                "seed": seed,
                **(config or {}),
            },
            environment={**MACHINE, **(environment or {})},
            metrics=tuple(curve),
            summary=ended,
        )

    return make


@pytest.fixture
def make_runs(make_run):
    """Make runs from `{normalizer: {images_per_forward: accuracies of seeds 0, 1, ...}}`."""

    def make(accuracies, **more):
        return [
            make_run(name, size, accuracy, seed=seed, **more)
            for name, by_size in accuracies.items()
            for size, seeds in by_size.items()
            for seed, accuracy in enumerate(seeds if isinstance(seeds, list) else [seeds])
        ]

    return make
