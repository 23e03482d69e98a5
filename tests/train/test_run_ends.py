"""How runs begin again and end: the configuration that is gone on with, one folder for all processes, errors that are told."""

from pathlib import Path

import pytest

from batchless.runs import RunFolder, read_run
from batchless.tasks import TrainConfig
from batchless.train import Processes, TrainingStoppedError
from batchless.train.run_ends import begun, failure_told, on_first


def made(folder: Path) -> RunFolder:
    config = TrainConfig(out="elsewhere", images_per_step=6, images_per_forward=2)
    return RunFolder.create(folder, config=config.plain(), seed=0)


def test_a_run_is_gone_on_with_where_it_lies(tmp_path):
    made(tmp_path / "run").release()
    found = begun(tmp_path / "run", TrainConfig, root="moved")
    assert (found.out, found.data.root, found.images_per_step) == (str(tmp_path / "run"), "moved", 6)
    assert begun(tmp_path / "run", TrainConfig).data.root is None
    assert begun(tmp_path / "run", TrainConfig, device="cuda:1").device == "cuda:1"


def test_what_has_ended_is_not_gone_on_with_and_what_has_failed_is(tmp_path):
    with made(tmp_path / "run") as run:
        run.finish({"failed": "no space left"})
        assert begun(run.path, TrainConfig).images_per_step == 6
        run.finish({"test_accuracy": 0.5})
        with pytest.raises(ValueError, match="has ended: there is nothing to go on with"):
            begun(run.path, TrainConfig)
    with pytest.raises(ValueError, match="holds no run"):
        begun(tmp_path, TrainConfig)


@pytest.mark.parametrize("explained", [True, False])
def test_an_error_becomes_the_summary_and_goes_on(explained, tmp_path):
    error, shown = RuntimeError("one value\nper channel"), ValueError("choose gn")
    with (
        made(tmp_path / "run") as run,
        pytest.raises(ValueError if explained else RuntimeError) as raised,
        failure_told(run, lambda each: shown if explained else each),
    ):
        raise error
    assert raised.value is (shown if explained else error)
    assert read_run(tmp_path / "run").summary == {
        "failed": "choose gn" if explained else "RuntimeError: one value per channel"
    }


def test_a_run_that_was_stopped_has_no_summary(tmp_path):
    with made(tmp_path / "run") as run, pytest.raises(TrainingStoppedError), failure_told(run):
        raise TrainingStoppedError(3)
    assert read_run(tmp_path / "run").summary is None
    with pytest.raises(RuntimeError), failure_told(None):
        raise RuntimeError


def test_the_first_process_has_the_folder_and_all_its_error(tmp_path):
    alone = Processes.alone() if hasattr(Processes, "alone") else Processes()
    run = on_first(alone, lambda: made(tmp_path / "run"))
    assert run is not None
    run.release()
    with pytest.raises(ValueError, match="already holds a run"):
        on_first(alone, lambda: made(tmp_path / "run"))
