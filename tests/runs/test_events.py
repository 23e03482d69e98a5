"""What TensorBoard reads of a run."""

from pathlib import Path

import pytest

from batchless.runs import RunFolder


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_numbers_are_written_at_the_images_seen(tmp_path):
    with RunFolder.create(tmp_path, config={}, seed=0, tensorboard=True) as run:
        run.log({"kind": "train", "images": 4, "loss": 2.5})
        run.log({"kind": "test", "images": 8, "accuracy": 0.5, "loss": 1.5})
    assert scalars(tmp_path) == {"train/loss": [(4, 2.5)], "test/accuracy": [(8, 0.5)], "test/loss": [(8, 1.5)]}


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    with RunFolder.create(tmp_path, config={}, seed=0, tensorboard=True) as run:
        for images in (4, 8, 12):
            run.log({"kind": "train", "images": images, "loss": 1.0})
    with RunFolder.resume(tmp_path, images=4, tensorboard=True) as run:
        for images in (8, 12):
            run.log({"kind": "train", "images": images, "loss": 2.0})
    assert scalars(tmp_path) == {"train/loss": [(4, 1.0), (8, 2.0), (12, 2.0)]}


def test_nothing_is_written_unless_asked_for(tmp_path):
    with RunFolder.create(tmp_path, config={}, seed=0) as run:
        run.log({"kind": "train", "images": 4, "loss": 2.5})
    assert not (tmp_path / "tensorboard").exists()
