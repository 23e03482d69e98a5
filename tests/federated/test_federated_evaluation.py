"""Who is evaluated on what: the global model, a client's own, and models for the never seen."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_federation import STATISTICS, client, federation, network, rounds, same_bits, settings
from torch import Tensor, nn

import batchless as bl
from batchless.data import ImageDataset
from batchless.data.statistics import normalized
from batchless.federated.algorithms import Centralized, FedAvg, FedBN, SiloBN, Standalone
from batchless.federated.client import load_state
from batchless.federated.evaluation import Evaluation, mean_of
from batchless.federated.server import initial_state
from batchless.tasks import Classify

CLIENTS = (client(0, 7, validation=3), client(1, 6, domain="light", validation=2), client(2, 5, validation=4))
WORLD = federation(*CLIENTS)


def tensors(dataset: ImageDataset, indices: range | None = None) -> tuple[Tensor, Tensor]:
    indices = range(len(dataset)) if indices is None else indices
    pictures = normalized(torch.stack([dataset.image(i) for i in indices]), STATISTICS)
    return pictures, torch.tensor([dataset.label(i) for i in indices])


@torch.no_grad()
def figures(model: nn.Module, dataset: ImageDataset, indices: range | None = None) -> tuple[float, float]:
    """Accuracy and loss, by hand."""
    pictures, labels = tensors(dataset, indices)
    scores = model.eval()(pictures)
    return float((scores.argmax(1) == labels).double().mean()), float(F.cross_entropy(scores, labels))


def evaluated(algorithm, state, locals, world=WORLD, *, normalizer="bn", domains=None):
    evaluation = Evaluation(
        model=network(normalizer, seed=5),
        state=state,
        locals=locals,
        federation=world,
        algorithm=algorithm,
        task=Classify(),
        settings=settings(),
    )
    return evaluation.of_domains(world.domains if domains is None else domains)


@pytest.mark.parametrize("algorithm", [FedAvg(), Centralized(), FedBN()])
def test_the_global_model_on_every_domain(algorithm):
    """FedBN too, where there is no normalization layer: nothing stays with a client."""
    normalizer = "none+sws" if isinstance(algorithm, FedBN) else "bn"
    state, locals = rounds(algorithm, network(normalizer), CLIENTS, 1)
    found = evaluated(algorithm, state, locals, normalizer=normalizer)
    model = network(normalizer, seed=9)
    load_state(model, state, None)
    assert found.keys() == {"dark", "light"}
    for domain, values in found.items():
        accuracy, loss = figures(model, WORLD.tests[domain])
        assert values["accuracy"] == pytest.approx(accuracy)
        assert values["loss"] == pytest.approx(loss, rel=1e-5)
        assert "unseen" not in values
    pooled = [(*figures(model, CLIENTS[i].validation), len(CLIENTS[i].validation)) for i in (0, 2)]
    assert found["dark"]["validation_loss"] == pytest.approx(sum(loss * n for _, loss, n in pooled) / 7, rel=1e-5)
    assert found["light"]["validation_accuracy"] == pytest.approx(figures(model, CLIENTS[1].validation)[0])


@pytest.mark.parametrize("algorithm", [SiloBN(), FedBN(), Standalone()])
def test_own_models_each_on_a_fixed_share_of_their_domain(algorithm):
    state, locals = rounds(algorithm, network(), CLIENTS, 1)
    found = evaluated(algorithm, state, locals)
    model = network(seed=9)
    parts = []
    for position, one in enumerate((0, 2)):
        load_state(model, state, locals[one])
        test = WORLD.tests["dark"]
        share = range(position, len(test), 2)
        parts.append((*figures(model, test, share), figures(model, CLIENTS[one].validation)[1]))
    assert found["dark"]["accuracy"] == pytest.approx(sum(p[0] for p in parts) / 2)
    assert found["dark"]["loss"] == pytest.approx(sum(p[1] for p in parts) / 2, rel=1e-5)
    assert found["dark"]["validation_loss"] == pytest.approx(sum(p[2] for p in parts) / 2, rel=1e-5)
    load_state(model, state, locals[1])
    assert found["light"]["loss"] == pytest.approx(figures(model, WORLD.tests["light"])[1], rel=1e-5)


@pytest.mark.parametrize("algorithm", [SiloBN(), FedBN()])
def test_a_client_that_never_trained_has_statistics_of_its_own_images(algorithm):
    state, locals = rounds(algorithm, network(), CLIENTS, 1)
    without = {one: local for one, local in locals.items() if one != 1}
    found = evaluated(algorithm, state, without)
    model = network(seed=9)
    load_state(model, state, None)
    bl.recalibrate(model, [tensors(CLIENTS[1].train)[0]])
    assert found["light"]["loss"] == pytest.approx(figures(model, WORLD.tests["light"])[1], rel=1e-5)
    assert found["light"]["unseen"] == 1.0
    assert found["dark"] == evaluated(algorithm, state, locals)["dark"], "the others are not touched"


@pytest.mark.parametrize("algorithm", [SiloBN(), FedBN()])
def test_a_domain_without_clients_has_statistics_of_its_images_and_never_of_its_labels(algorithm):
    world = federation(*CLIENTS, unseen=("sketch",))
    state, locals = rounds(algorithm, network(), CLIENTS, 1)
    found = evaluated(algorithm, state, locals, world)["sketch"]
    model = network(seed=9)
    load_state(model, state, None)
    bl.recalibrate(model, [tensors(world.tests["sketch"])[0]])
    assert found["loss"] == pytest.approx(figures(model, world.tests["sketch"])[1], rel=1e-5)
    assert found["unseen"] == 1.0
    assert "validation_loss" not in found


def test_the_mean_of_the_layers_where_that_is_chosen():
    world = federation(*CLIENTS, unseen=("sketch",))
    algorithm = FedBN(unseen="mean")
    state, locals = rounds(algorithm, network(), CLIENTS, 1)
    found = evaluated(algorithm, state, locals, world)["sketch"]
    model = network(seed=9)
    mean = mean_of(locals)
    torch.testing.assert_close(mean["1.weight"], sum(local["1.weight"] for local in locals.values()) / 3)
    assert mean["1.num_batches_tracked"] == max(local["1.num_batches_tracked"] for local in locals.values())
    assert mean["1.num_batches_tracked"].dtype == torch.int64
    load_state(model, state, mean)
    assert found["loss"] == pytest.approx(figures(model, world.tests["sketch"])[1], rel=1e-5)
    assert found["loss"] != evaluated(FedBN(), state, locals, world)["sketch"]["loss"]
    assert evaluated(algorithm, state, {}, world)["sketch"]["unseen"] == 1.0, "nobody has any: estimated anew"


def test_local_layers_without_statistics_have_nothing_to_estimate():
    world = federation(*CLIENTS, unseen=("sketch",))
    state, locals = rounds(FedBN(), network("gn"), CLIENTS, 1)
    found = evaluated(FedBN(), state, locals, world, normalizer="gn")["sketch"]
    model = network("gn", seed=9)
    load_state(model, state, None)
    assert found["loss"] == pytest.approx(figures(model, world.tests["sketch"])[1], rel=1e-5)


def test_standalone_on_a_domain_of_nobody_is_the_mean_of_all_models():
    world = federation(*CLIENTS, unseen=("sketch",))
    state, locals = rounds(Standalone(), network(), CLIENTS, 1)
    found = evaluated(Standalone(), state, locals, world)["sketch"]
    test, model, losses = world.tests["sketch"], network(seed=9), []
    for position in range(3):
        load_state(model, state, locals[position])
        losses.append(figures(model, test, range(position, len(test), 3))[1])
    assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_more_clients_than_test_images():
    crowd = tuple(client(id, 2) for id in range(12))
    world = federation(*crowd)
    state, locals = rounds(FedBN(), network(), crowd, 1)
    found = evaluated(FedBN(), state, locals, world)["dark"]
    assert len(world.tests["dark"]) == 10
    assert 0 <= found["accuracy"] <= 1


def test_some_domains_only_and_nothing_is_changed():
    state, locals = rounds(FedBN(), network(), CLIENTS, 1)
    kept = {one: {name: value.clone() for name, value in local.items()} for one, local in locals.items()}
    shared = {name: value.clone() for name, value in state.shared.items()}
    whole = evaluated(FedBN(), state, locals)
    parts = evaluated(FedBN(), state, locals, domains=["light"]) | evaluated(FedBN(), state, locals, domains=["dark"])
    assert parts == whole
    assert evaluated(FedBN(), state, locals, domains=["light"]).keys() == {"light"}
    assert same_bits(shared, state.shared)
    assert all(same_bits(kept[one], locals[one]) for one in kept)


def test_the_order_of_the_domains_is_the_federations_and_without_validation_there_is_none():
    world = replace(WORLD, clients=tuple(replace(one, validation=None) for one in CLIENTS), domains=("light", "dark"))
    found = evaluated(FedAvg(), initial_state(network(), FedAvg(), 1), {}, world)
    assert list(found) == ["light", "dark"]
    assert found["dark"].keys() == {"accuracy", "loss"}
