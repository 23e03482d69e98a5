"""Three processes that share each step's micro-batches are one process that has all of them."""

from pathlib import Path

import loop_worker
import pytest
import torch
from tiny_training import TinyData, settings, tiny_model

from batchless.runs import load_checkpoint
from batchless.tasks import Classify
from batchless.train import Processes, train

COUNT = 3
"""No divisor of 4 micro-batches a step: shares differ, and in a ragged step one process has none."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(loop_worker.run, (COUNT, str(folder)), nprocs=COUNT)
    return folder


def found(folder: Path, rank: int, normalizer: str) -> dict:
    return torch.load(folder / f"{rank}-{normalizer}.pt", weights_only=True)


@pytest.mark.parametrize("normalizer", loop_worker.NORMALIZERS)
def test_all_processes_end_alike(trained, normalizer):
    first = found(trained, 0, normalizer)
    for rank in range(1, COUNT):
        other = found(trained, rank, normalizer)
        assert other["figures"] == first["figures"]
        for name, value in first["model"].items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(value, other["model"][name]), name
    saved = load_checkpoint(trained / normalizer / "checkpoints" / "last.pt")["model"]
    assert all(torch.equal(saved[name], value) for name, value in first["model"].items())


@pytest.mark.parametrize("normalizer", ["gn+ws", "bcn-micro+ws"])
def test_they_learn_what_one_learns(trained, normalizer):
    model = tiny_model(normalizer)
    summary = train(model, Classify(), TinyData(), settings(images_per_forward=1, evaluations=3), None)
    together = found(trained, 0, normalizer)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(together["model"][name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert together["figures"]["test_accuracy"] == summary["test_accuracy"]
    assert together["figures"]["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_an_error_of_the_first_process_is_everyones(monkeypatch):
    """Otherwise the others would wait for it for ever."""
    for rank in (0, 1):
        processes = Processes(rank, 2)
        error = ValueError("the folder is taken") if rank == 0 else None
        monkeypatch.setattr(Processes, "gather", lambda self, value: ["the folder is taken", None])
        with pytest.raises(ValueError, match="the folder is taken"):
            processes.agree(error)
