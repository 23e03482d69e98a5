"""An optimizer step over two processes equals the step of one process on the data of both."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accumulate_worker as worker
import pytest
import torch
import torch.multiprocessing

RANKS = (0, 1)
Results = list[dict[str, dict[str, Any]]]


def load(folder: Path) -> Results:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in RANKS]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("processes")
    names = [*worker.SCENARIOS, *worker.DISTRIBUTED_ONLY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(worker.run, (str(folder), names, f"file://{folder}/rendezvous"), nprocs=2)
    return load(folder)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


SHARED = [name for name, run in worker.SCENARIOS.items() if isinstance(run, worker.Data) and run.process_group]


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_equal_one_with_the_data_of_both(results, name):
    expected = worker.SCENARIOS[name](None)
    start = worker.network("bcn-micro", "ws").state_dict()
    assert (expected["1.batch_norm.running_mean"] - start["1.batch_norm.running_mean"]).abs().max() > 0.01
    assert (expected["0.weight"] - start["0.weight"]).abs().max() > 1e-4
    for rank in RANKS:
        assert_equal(results[rank][name], expected)


@pytest.mark.parametrize("name", SHARED)
def test_both_processes_end_with_the_same_bits(results, name):
    torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)


def test_torchrun_gives_what_one_process_gives(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*launch, "--nproc_per_node=2", worker.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    for given in load(tmp_path):
        assert list(given) == list(worker.UNDER_TORCHRUN)
        for name, state in given.items():
            assert_equal(state, worker.SCENARIOS[name](None))


def test_a_parameter_used_on_one_rank_gets_the_same_gradient_on_all(results):
    expected = worker.branches(None)
    for rank in RANKS:
        given = results[rank]["branches"]
        assert_equal(given["gradients"], expected["gradients"])
        assert_equal(given["after"], expected["after"])
        assert given["clipped"] == 1
        for head in ("first", "second"):
            assert given["gradients"][f"heads.{head}.weight"].abs().max() > 0


def test_a_parameter_used_on_no_rank_keeps_no_gradient_and_its_value(results):
    for rank in RANKS:
        given = results[rank]["branches"]
        assert given["gradients"]["heads.neither.weight"] is None
        # AdamW would let a zero gradient decay the weight.
        assert torch.equal(given["after"]["heads.neither.weight"], given["before"]["heads.neither.weight"])


def test_no_process_group_means_no_reduction(results):
    both = worker.SCENARIOS["alone"]
    for rank in RANKS:
        own = tuple(share if r == rank else () for r, share in enumerate(both.ranks))
        alone = worker.Data(ranks=own, process_group=None)(None)
        assert_equal(results[rank]["alone"], alone)
    assert not torch.equal(results[0]["alone"]["0.weight"], results[1]["alone"]["0.weight"])


def test_a_group_is_reduced_over_and_a_group_of_one_is_not(results):
    pair, alone = ([given["groups"][name] for given in results] for name in ("pair", "alone"))
    batches = [worker.micro_batches([(3, 3), (1, 1)], seed=0), worker.micro_batches([(2, 2)], seed=1)]
    for data, states in (([batches[0] + batches[1]] * 2, pair), (batches, alone)):
        for own, state in zip(data, states, strict=True):
            model = worker.network("gn", "ws")
            worker.block_step(model, torch.optim.SGD(model.parameters(), lr=0.1), own)
            assert_equal(state, model.state_dict())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no backward", ["step.backward", "sample"]),
        ("no labels", ["step.backward", "sample"]),
        ("no labels, tensor counts", ["step.backward", "sample"]),
        ("update in the forward", ["update", "'step'"]),
    ],
)
def test_a_mistake_raises_on_all_ranks_and_leaves_the_model_as_it_was(results, name, words):
    for rank in RANKS:
        given = results[rank][name]
        assert all(word in given["message"] for word in words), given["message"]
        assert_equal(given["after"], given["before"])
        assert set(given["without"]) == {key for key, _ in worker.network("bcn-micro", "ws").named_parameters()}
        assert not torch.equal(given["later"]["0.weight"], given["before"]["0.weight"])


@pytest.mark.parametrize("form", ["plain", "compiled"])
def test_a_wrapped_model_is_refused_by_name_on_all_ranks(results, form):
    for rank in RANKS:
        message = results[rank]["wrapped"][form]
        assert "DistributedDataParallel" in message
        assert "bare model" in message


def test_sums_over_samples_do_not_overflow_in_half_precision(results):
    for rank in RANKS:
        assert results[rank]["half"]["weight"].item() == pytest.approx(2e4, rel=1e-3)
