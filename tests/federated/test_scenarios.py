"""The scenarios of the papers are settings: few of many clients, tiny batches, label skew, growing numbers of clients."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from domain_runs import assert_same, config, result, write_domains

from batchless.federated import run_federation
from batchless.federated.preparation import open_federation
from batchless.report.federated_partition import read_partitions
from batchless.runs import read_run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"), train=80)


def one_round(name: str, root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    data = {"validation_share": 0.0} | changes.pop("data", {})
    run_federation(config(name, root, out, **{"rounds": 1, "fraction": 1.0, "data": data} | changes))
    return read_run(out).summary or {}


@pytest.mark.parametrize("name", ["fedavg", "fedbn", "fedwon"])
def test_cross_device_a_fraction_of_120_clients(name, root, tmp_path):
    """Two images a client; 5 % of 120 clients are 6."""
    summary = one_round(name, root, tmp_path / "run", clients_per_domain=40, fraction=0.05)
    assert (summary["images"], summary["left_out"]) == (12, 0)
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert len(partition["clients"]) == 120


@pytest.mark.parametrize(("name", "size"), [("fedwon", 1), ("fedwon", 2), ("fedbn", 2), ("fedavg", 2)])
def test_one_and_two_images_per_step(name, size, root, tmp_path):
    data = {"images_per_client": 5}  # at two, the last image joins the step before
    summary = one_round(name, root, tmp_path / "run", clients_per_domain=1, images_per_step=size, data=data)
    assert (summary["images"], summary["left_out"]) == (15, 0)


def test_several_local_epochs(root, tmp_path):
    summary = one_round("fedavg", root, tmp_path / "run", local_epochs=5, data={"images_per_client": 4})
    assert summary["images"] == 9 * 4 * 5


def test_growing_numbers_of_clients_share_the_same_images(root, tmp_path):
    for number in (1, 2, 4, 8):
        federation = open_federation(
            config("fedavg", root, tmp_path, clients_per_domain=number, data={"validation_share": 0.0})
        )
        assert len(federation.clients) == 3 * number
        held = [len(client.train) for client in federation.clients]
        assert held == [80 // number] * (3 * number)


def test_label_skew_from_dirichlet_01_to_iid(root, tmp_path):
    """The share of a client's most frequent class, of ten: near 1/10 if IID, the higher the smaller alpha is."""

    def skew(data: dict[str, Any]) -> float:
        whole = config("fedavg", root, tmp_path, clients_per_domain=4, data={"validation_share": 0.0} | data)
        rows = [np.array(row["counts"]) for row in open_federation(whole).record["clients"]]
        return float(np.mean([counts.max() / counts.sum() for counts in rows]))

    found = [skew({"partitioner": "dirichlet", "alpha": alpha, "minimum": 1}) for alpha in (0.1, 0.5, 1.0)]
    found.append(skew({"partitioner": "iid"}))
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.4
    assert found[-1] < 0.3


@pytest.mark.parametrize("name", ["fedavg", "fedbn"])
def test_clients_that_mix_domains_are_evaluated_on_each(name, root, tmp_path):
    """Two workers and one have the same bits; every client's validation images count where they come from."""
    data = {"validation_share": 0.2}
    given = {"clients_per_domain": 2, "domains_per_client": 2, "data": data}
    summary = one_round(name, root, tmp_path / "one", **given)
    assert set(summary["domains"]) == {"inverted", "pale", "plain"}
    assert all({"accuracy", "validation_accuracy"} <= set(figures) for figures in summary["domains"].values())
    assert summary["images"] == 3 * 80 * 0.8
    assert summary["test_accuracy"] == pytest.approx(np.mean([f["accuracy"] for f in summary["domains"].values()]))
    one_round(name, root, tmp_path / "two", **given, workers=2)
    assert_same(result(tmp_path / "one"), result(tmp_path / "two"))
    (shown,), notes = read_partitions([read_run(tmp_path / "one")])
    assert not notes
    assert shown.domains == ("inverted+pale", "pale+plain", "plain+inverted")
    assert {holder.validation for holder in shown.holders} == {8}


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_training_under_label_skew(alpha, root, tmp_path):
    data = {"partitioner": "dirichlet", "alpha": alpha, "minimum": 2}
    summary = one_round("fedwon", root, tmp_path / "run", clients_per_domain=4, fraction=0.5, data=data)
    assert summary["left_out"] == 0
