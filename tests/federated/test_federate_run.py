"""A federated run's settings, and what it leaves in its folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from domain_runs import OPTIMIZER, config, write_domains

from batchless.data import Augment
from batchless.federated import (
    FederateConfig,
    FederatedDataSettings,
    ServerSettings,
    explain_federation,
    run_federation,
)
from batchless.federated.rounds import RoundProgress
from batchless.federated.sampling import sampled_clients
from batchless.federated.state import client_checkpoint
from batchless.runs import load_checkpoint, load_model_state, read_run
from batchless.runs.checkpoint import save_checkpoint
from batchless.tasks import load_trained
from batchless.train import OptimizerSettings


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


DOMAINS = ("inverted", "pale", "plain")


@pytest.fixture(scope="module")
def fedbn(root, tmp_path_factory) -> tuple[Path, list[RoundProgress]]:
    """Three rounds, of which the second and the last are evaluated."""
    folder = tmp_path_factory.mktemp("runs") / "fedbn"
    shown: list[RoundProgress] = []
    said: list[str] = []
    asked = config("fedbn", root, folder, rounds=3, evaluate_every=2, tensorboard=True)
    run_federation(asked, shown.append, on_start=lambda text: said.append(f"{len(shown)} {text}"))
    assert said == [f"0 {explain_federation(asked)}"]
    return folder, shown


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_run(folder).metrics if line["kind"] == kind]


# What is in the folder.


def test_the_log_has_a_line_for_each_round_and_each_evaluated_domain(fedbn):
    folder, _ = fedbn
    rounds = lines(folder, "round")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert set(rounds[0]) == {"kind", "round", "images", "seconds", "loss", "bytes", "left_out"}
    tests = lines(folder, "test")
    assert [(line["round"], line["domain"]) for line in tests] == [(r, d) for r in (2, 3) for d in (*DOMAINS, "mean")]
    for first in (0, 4):
        *domains, mean = tests[first : first + 4]
        for name in ("accuracy", "loss", "validation_accuracy"):
            assert mean[name] == pytest.approx(sum(line[name] for line in domains) / 3)
        assert mean["images"] == rounds[mean["round"] - 1]["images"]


def test_images_and_bytes_are_counted(fedbn, root):
    """12 images a client, 1 for validation; 60 % of nine clients are five. FedBN sends all but normalization layers."""
    folder, _ = fedbn
    rounds = lines(folder, "round")
    assert [line["images"] for line in rounds] == [55, 110, 165]
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.pt")
    weights = [value for name, value in checkpoint["model"].items() if value.dim() > 1 or name == "fc.bias"]
    elements = sum(weight.numel() for weight in weights)
    assert [line["bytes"] for line in rounds] == [2 * 5 * 4 * elements * round for round in (1, 2, 3)]


def test_the_clients_that_have_layers_of_their_own_are_those_that_were_drawn(fedbn):
    folder, _ = fedbn
    drawn = {client for round in (1, 2, 3) for client in sampled_clients(9, fraction=0.6, seed=0, round=round)}
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert set(checkpoint["locals"]) == drawn
    assert len(drawn) > 5
    assert checkpoint["clients"] == [{"id": id, "domain": DOMAINS[id // 3]} for id in range(9)]


def test_the_summary_has_the_last_round_and_the_one_chosen_by_validation(fedbn):
    folder, _ = fedbn
    summary = read_run(folder).summary
    tests = {(line["round"], line["domain"]): line for line in lines(folder, "test")}
    assert summary["test_accuracy"] == tests[3, "mean"]["accuracy"]
    assert summary["test_loss"] == tests[3, "mean"]["loss"]
    for domain in DOMAINS:
        for name, value in summary["domains"][domain].items():
            assert tests[3, domain][name] == value
    best = max((2, 3), key=lambda round: tests[round, "mean"]["validation_accuracy"])
    assert summary["chosen_round"] == best
    assert summary["chosen_test_accuracy"] == tests[best, "mean"]["accuracy"]
    assert load_checkpoint(folder / "checkpoints" / "best.pt")["round"] == best
    assert (summary["rounds"], summary["images"], summary["left_out"]) == (3, 165, 0)
    assert summary["seconds"] > 0


def test_without_validation_images_no_round_is_chosen(root, tmp_path):
    finished = run_federation(config("fedavg", root, tmp_path / "run", data={"validation_images": 0}))
    assert not any(name.startswith("chosen") for name in finished.summary)
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()
    assert "validation_accuracy" not in lines(tmp_path / "run", "test")[0]


def test_partition_conversion_and_sharing_are_written_before_the_first_round(fedbn):
    folder, _ = fedbn
    partition = json.loads((folder / "partition.json").read_text())
    assert [row["domain"] for row in partition["clients"]] == [d for d in DOMAINS for _ in range(3)]
    assert [len(row["train"]) for row in partition["clients"]] == [11] * 9
    sharing = (folder / "sharing.txt").read_text()
    assert "affine" in sharing
    assert "stays with the client" in sharing
    assert json.loads((folder / "conversion.json").read_text())["normalizer"] == "bn"
    assert list((folder / "tensorboard").iterdir())


def test_the_folders_configuration_makes_the_run_again(fedbn, root, tmp_path):
    folder, _ = fedbn
    plain = read_run(folder).config
    assert plain["kind"] == "federate"
    again = FederateConfig.from_plain(plain, source="config.yaml")
    run_federation(replace(again, out=str(tmp_path / "again")))
    first, second = (load_checkpoint(path / "checkpoints" / "last.pt") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_progress_is_shown_after_each_client_round_and_evaluation(fedbn):
    _, shown = fedbn
    assert [(one.round, one.clients) for one in shown[:6]] == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 5)]
    assert all(one.rounds == 3 and one.clients_in_round == 5 for one in shown)
    assert set(shown[-1].domains) == set(DOMAINS)
    assert {"loss", "left_out", "test_accuracy", "test_validation_accuracy"} <= set(shown[-1].figures)


def test_it_learns(tmp_path):
    """65 images in each of three domains: the loss falls from that of ten classes, ln 10 = 2.3, and tests are above 10 %."""
    root = write_domains(tmp_path / "domains", train=72)
    given = {"rounds": 16, "evaluate_every": 16, "clients_per_domain": 1}
    asked = config("fedavg", root, tmp_path / "run", optimizer=replace(OPTIMIZER, learning_rate=0.1), **given)
    finished = run_federation(asked)
    losses = [line["loss"] for line in lines(tmp_path / "run", "round")]
    assert losses[0] > 2.1
    assert losses[-1] < 1.5
    assert finished.summary["test_accuracy"] > 0.25


# The checkpoint is one of a network like any other.


def test_checkpoints_are_those_of_a_trained_network(root, tmp_path):
    run_federation(config("fedwon", root, tmp_path / "run", rounds=1))
    trained = load_trained(tmp_path / "run" / "checkpoints" / "last.pt")
    assert trained.config.normalizer == "none+sws"
    assert trained.classes == tuple("0123456789")
    assert trained.statistics.mean == (0.5, 0.5, 0.5)
    assert trained.model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_one_clients_network_from_a_checkpoint(fedbn, tmp_path):
    """The checkpoint's network has the mean of the local layers; a client's has its own and loads as well."""
    folder, _ = fedbn
    last = folder / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(last)
    locals = checkpoint["locals"]
    mean = torch.stack([local["bn1.weight"].double() for local in locals.values()]).mean(0).float()
    torch.testing.assert_close(checkpoint["model"]["bn1.weight"], mean)
    client = min(locals)
    own = client_checkpoint(last, client)
    assert torch.equal(own["model"]["bn1.running_var"], locals[client]["bn1.running_var"])
    assert torch.equal(own["model"]["conv1.weight"], checkpoint["model"]["conv1.weight"])
    save_checkpoint(tmp_path / "client.pt", own)
    model = load_trained(tmp_path / "client.pt").model
    load_model_state(model, own["model"], source="the client's")
    with pytest.raises(ValueError, match=r"client 9 has no layers of its own in .*clients that have: 0, 1"):
        client_checkpoint(last, 9)


def test_a_run_without_local_layers_has_no_clients_networks(root, tmp_path):
    run_federation(config("fedavg", root, tmp_path / "run", rounds=1))
    with pytest.raises(ValueError, match="the network is the same for all"):
        client_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", 0)


# Unseen domains, and explanations.


def test_a_domain_left_out_is_tested_on_but_not_in_the_mean(root, tmp_path):
    run_federation(config("fedavg", root, tmp_path / "run", rounds=1, data={"unseen_domains": ("pale",)}))
    by_domain = {line["domain"]: line for line in lines(tmp_path / "run", "test")}
    seen = [by_domain[name]["accuracy"] for name in ("inverted", "plain")]
    assert by_domain["mean"]["accuracy"] == pytest.approx(sum(seen) / 2)
    assert "accuracy" in by_domain["pale"]


def test_explaining_trains_and_writes_nothing(root, tmp_path):
    text = explain_federation(config("fedbn", root, tmp_path / "run", normalizer="none+sws"))
    assert "9 clients, 5 in a round" in text
    assert "fedbn makes no difference to fedavg here" in text
    assert not (tmp_path / "run").exists()


# Settings.


def test_rotation_is_an_augmentation_of_a_federated_run():
    settings = FederateConfig(data=FederatedDataSettings(rotation=30.0)).client_settings(device="cpu")
    assert settings.augment == Augment(crop_padding=0, flip=False, rotation=30.0)


def test_fedwon_brings_its_normalizer_and_its_clipping():
    assert FederateConfig(algorithm="fedwon").resolved_normalizer() == "none+sws"
    clips = {
        (algorithm, step): FederateConfig(algorithm=algorithm, images_per_step=step).client_settings(device="cpu")
        for algorithm in ("fedwon", "fedavg")
        for step in (2, 32)
    }
    found = {key: settings.optimizer.adaptive_clipping for key, settings in clips.items()}
    assert found == {("fedwon", 2): None, ("fedwon", 32): 0.1, ("fedavg", 2): None, ("fedavg", 32): None}
    own = OptimizerSettings(clip_norm=1.0)
    assert FederateConfig(algorithm="fedwon", optimizer=own).client_settings(device="cpu").optimizer == own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "fedbm"}, "unknown algorithm 'fedbm'.*did you mean fedbn"),
        ({"algorithm": "fedwon", "normalizer": "gn"}, "fedwon is the method without normalization"),
        ({"normalizer": "gm"}, "gm"),
        ({"mu": 0.1}, "fedavg has no setting 'mu'"),
        ({"algorithm": "fedprox", "mu": -1.0}, "mu must be from 0"),
        ({"server": ServerSettings(name="fedadm")}, "did you mean fedadam"),
        ({"server": ServerSettings(momentum=0.5)}, "average has no setting 'momentum'"),
        ({"images_per_step": 32, "images_per_forward": 3}, "must be a multiple of images_per_forward=3"),
        ({"fraction": 0.0}, "fraction is a share of the clients, above 0 and at most 1; got 0.0"),
        ({"domains_per_client": 2, "engine": "flower"}, "domains_per_client must be 1, got 2"),
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"workers": 0}, "workers must be 1 or more, got 0"),
        ({"device": "gpu"}, "device must be cpu"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(given, message):
    with pytest.raises(ValueError, match=message) as raised:
        FederateConfig(**given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"partitioner": "dirichlett"}, "did you mean 'dirichlet'"),
        ({"alpha": 0.1}, "partitioner iid has no setting 'alpha'"),
        ({"partitioner": "dirichlet", "alpha": 0.0}, "alpha"),
        ({"validation_images": 5, "validation_share": 0.1}, "are alternatives: set one of them"),
        ({"validation_share": 1.0}, "data.validation_share must be from 0 to below 1"),
        ({"image_size": 0}, "data.image_size must be 1 or more, got 0"),
        ({"test_share": 0.0}, "data.test_share must be above 0"),
        ({"normalize": "mean"}, "data.normalize must be half, imagenet, none"),
        ({"crop_padding": -1}, "data.crop_padding must be 0 or more"),
        ({"color_jitter": 2.0}, "data: color_jitter"),
        ({"rotation": 200.0}, "data: rotation=200.0: give degrees from 0 to 180"),
    ],
)
def test_a_wrong_setting_of_the_data_is_one_clear_line(given, message):
    with pytest.raises(ValueError, match=message) as raised:
        FederatedDataSettings(**given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_clients": 10}, "min_clients=10, but 9 clients take part in a round"),
        ({"model": "cifar_resnet9"}, "depth is 6 n"),
        ({"data": {"unseen_domains": ("pail",)}}, "unseen domain 'pail'"),
        ({"data": {"domains": ("plane",)}}, "domain 'plane': there is none of that name"),
        ({"domains_per_client": 4}, "domains_per_client=4: give 1 to 3, the domains with clients"),
        ({"clients_per_domain": 100}, "36 training images for 100 clients"),
        ({"model": "torchvision:alexnet"}, "torchvision:alexnet does not run on 8x8 images"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(changes, message, root, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_federation(config("fedavg", root, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_kind_of_run_is_told_apart():
    with pytest.raises(
        ValueError, match="x is of no federated run: `batchless train --resume` goes on with a training"
    ):
        FederateConfig.from_plain({"model": "cifar_resnet8"}, source="x")
    with pytest.raises(ValueError, match="unknown setting 'colour'"):
        FederateConfig.from_plain({"kind": "federate", "colour": 1}, source="x")
    with pytest.raises(ValueError, match="unknown setting 'shades'"):
        FederateConfig.from_plain({"kind": "federate", "data": {"shades": 1}}, source="x")


def test_batch_normalization_on_single_images_fails_with_its_reason(root, tmp_path):
    """One image of 1x1 values a channel: every client fails, and the message says why."""
    asked = config("fedavg", root, tmp_path / "run", model="digits_cnn_32", images_per_step=1)
    asked = replace(asked, data=replace(asked.data, image_size=32, images_per_client=1))
    with pytest.raises(ValueError, match="0 of 9 clients left"):
        run_federation(asked)
    assert "clients left" in read_run(tmp_path / "run").summary["failed"]
