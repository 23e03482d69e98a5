"""From domains to clients: nothing twice, the asked sizes, a record that says all of it."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchless.data import open_domains
from batchless.data.memory import TensorImages
from batchless.federated.partition import partition
from batchless.federated.partitioners import IID, Dirichlet, Shards, Slices


def images(count: int, *, classes: tuple[str, ...] = ("a", "b", "c"), name: str = "images") -> TensorImages:
    """Images whose pixels are their index."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    labels = tuple(index % len(classes) for index in range(count))
    return TensorImages(images=pixels, labels=labels, classes=classes, origins=((name, count),))


TRAIN = {"x": images(90, name="x"), "y": images(60, name="y"), "z": images(75, name="z")}
TESTS = {"x": images(9), "y": images(6), "z": images(7)}


@given(
    clients=st.integers(1, 6),
    seed=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.1, 0.4]),
    limit=st.sampled_from([None, 1, 5, 1000]),
    partitioner=st.sampled_from([None, IID(), Slices(), Dirichlet(alpha=1, minimum=3), Shards()]),
)
def test_no_image_twice_and_none_lost_without_a_limit(clients, seed, share, limit, partitioner):
    federation = partition(
        TRAIN,
        TESTS,
        seed=seed,
        partitioner=partitioner,
        clients_per_domain=clients,
        validation_share=share,
        images_per_client=limit,
    )
    assert [client.id for client in federation.clients] == list(range(3 * clients))
    rows = federation.record["clients"]
    for domain, dataset in TRAIN.items():
        used = [index for row in rows if row["domain"] == domain for index in row["train"] + row["validation"]]
        assert len(set(used)) == len(used)
        if limit in (None, 1000):
            assert sorted(used) == list(range(len(dataset)))
    assert all(1 <= len(client.train) <= (limit or 1000) for client in federation.clients)
    if share == 0:
        assert all(client.validation is None for client in federation.clients)


def test_clients_hold_what_the_record_says():
    federation = partition(TRAIN, TESTS, seed=0, clients_per_domain=2, validation_images=5)
    for client, row in zip(federation.clients, federation.record["clients"], strict=True):
        assert (client.id, client.domain) == (row["id"], row["domain"])
        for part, indices, counts in (
            (client.train, row["train"], row["counts"]),
            (client.validation, row["validation"], row["validation_counts"]),
        ):
            assert [int(part.image(i)[0, 0, 0]) for i in range(len(part))] == indices
            assert part.source(0) == f"{client.domain} {indices[0]}"
            assert counts == [sum(part.label(i) == label for i in range(len(part))) for label in range(3)]
        assert len(client.validation) == 5


@pytest.mark.parametrize("several", [2, 3])
def test_clients_that_mix_domains_hold_parts_of_each_and_no_image_twice(several):
    whole = partition(TRAIN, TESTS, seed=0, clients_per_domain=2, domains_per_client=several)
    assert len(whole.clients) == 6
    names = list(TRAIN)
    used: dict[str, list[int]] = {domain: [] for domain in TRAIN}
    for client, row in zip(whole.clients, whole.record["clients"], strict=True):
        first = client.id // 2
        assert client.domains == tuple(names[(first + step) % 3] for step in range(several))
        assert client.domain == row["domain"] == "+".join(client.domains)
        sources = [client.train.source(i) for i in range(len(client.train))]
        assert sources == [f"{domain} {index}" for domain in client.domains for index in row["train"][domain]]
        labels = [client.train.label(i) for i in range(len(client.train))]
        assert row["counts"] == [labels.count(label) for label in range(3)]
        for domain, indices in row["train"].items():
            used[domain] += indices
    assert {domain: sorted(indices) for domain, indices in used.items()} == {
        domain: list(range(len(images))) for domain, images in TRAIN.items()
    }
    assert json.loads(json.dumps(whole.record)) == whole.record


def test_limits_of_a_mixing_client_are_shared_between_its_domains():
    whole = partition(TRAIN, TESTS, seed=0, domains_per_client=3, images_per_client=8, validation_images=4)
    for client, row in zip(whole.clients, whole.record["clients"], strict=True):
        assert len(client.train) == 8
        assert len(client.validation) == 4
        assert sorted(map(len, row["train"].values())) == [2, 3, 3]
        assert [len(client.validation_of(domain)) for domain in client.domains] == [1, 1, 2]


def test_one_domain_per_client_is_what_it_was():
    one, named = (
        partition(TRAIN, TESTS, seed=0, clients_per_domain=2, **given) for given in ({}, {"domains_per_client": 1})
    )
    assert one.record == named.record
    assert isinstance(one.record["clients"][0]["train"], list)


def test_the_record_is_json_and_complete():
    record = partition(TRAIN, TESTS, seed=3, partitioner=Dirichlet(alpha=2, minimum=1), unseen=["y"]).record
    assert json.loads(json.dumps(record)) == record
    assert record["partitioner"] == {"name": "dirichlet", "alpha": 2, "minimum": 1}
    assert (record["seed"], record["domains"], record["unseen"]) == (3, ["x", "y", "z"], ["y"])
    assert record["tests"]["x"] == {"images": 9, "counts": [3, 3, 3]}
    assert [row["counts"] for row in record["clients"]] == [[30, 30, 30], [25, 25, 25]]


def test_the_published_protocol_trains_on_the_first_and_validates_on_the_last():
    federation = partition(
        TRAIN, TESTS, seed=0, partitioner=Slices(), images_per_client=20, validation_images=10, clients_per_domain=1
    )
    rows = federation.record["clients"]
    assert [row["train"] for row in rows] == [list(range(20))] * 3
    assert [row["validation"] for row in rows] == [list(range(80, 90)), list(range(50, 60)), list(range(65, 75))]


def test_an_unseen_domain_has_no_client_but_is_tested_and_changes_nothing_for_the_others():
    whole = partition(TRAIN, TESTS, seed=0, clients_per_domain=2)
    without = partition(TRAIN, TESTS, seed=0, clients_per_domain=2, unseen=["x"])
    assert without.domains == whole.domains == ("x", "y", "z")
    assert without.tests == TESTS
    assert [client.domain for client in without.clients] == ["y", "y", "z", "z"]
    assert [client.id for client in without.clients] == [0, 1, 2, 3]
    assert [row["train"] for row in without.record["clients"]] == [row["train"] for row in whole.record["clients"][2:]]


def test_the_seed_and_nothing_else_decides():
    state = torch.get_rng_state()
    one, again, other = (partition(TRAIN, TESTS, seed=seed, clients_per_domain=3).record for seed in (0, 0, 1))
    assert one == again
    assert one["clients"] != other["clients"]
    assert torch.equal(state, torch.get_rng_state())


def test_domains_of_equal_size_are_dealt_out_independently():
    same = {"x": images(60), "y": images(60)}
    rows = partition(same, {"x": images(3), "y": images(3)}, seed=0).record
    assert rows["clients"][0]["train"] != rows["clients"][1]["train"]


def test_the_embedded_domains_at_the_published_size_of_digits_five():
    train, tests = open_domains(None, "train"), open_domains(None, "test")
    federation = partition(train, tests, seed=0, images_per_client=743)
    assert [(client.domain, len(client.train)) for client in federation.clients] == [(name, 743) for name in train]
    assert all(min(row["counts"]) > 40 for row in federation.record["clients"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients_per_domain": 0}, "clients_per_domain=0: give 1 or more"),
        ({"clients_per_domain": 61}, "domain 'y' has 60 training images for 61 clients"),
        ({"images_per_client": 0}, "images_per_client=0: give 1 or more"),
        ({"validation_images": -1}, "validation_images=-1: give 0 or more"),
        ({"validation_share": 1.0}, "validation_share=1.0: give a share"),
        ({"validation_share": 0.1, "validation_images": 1}, "validation_images=1 and validation_share=0.1: give one"),
        ({"validation_images": 60}, r"domain 'y': client 1 has 60 images, 60 of them for validation, and none left"),
        ({"validation_images": 70}, r"domain 'y': client 1 has 60 images, 70 of them for validation, and none left"),
        ({"unseen": ["w"]}, "unseen domain 'w': there is none of that name, there are x, y, z"),
        ({"unseen": ["x", "y", "z"]}, "no domain is left to train on"),
        ({"partitioner": Dirichlet(minimum=80)}, "domain 'y': dirichlet: 1 clients with minimum=80 .* there are 60"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        partition(TRAIN, TESTS, seed=0, **settings)
    assert "\n" not in str(error.value)


def test_domains_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="domain 'z' has training images but no test images"):
        partition(TRAIN, {"x": TESTS["x"], "y": TESTS["y"]}, seed=0)
    with pytest.raises(
        ValueError, match=r"domain 'y': its training images have 4 classes, domain 'x' has 3 \(.* in d\)"
    ):
        partition(TRAIN | {"y": images(8, classes=("a", "b", "c", "d"))}, TESTS, seed=0)
    with pytest.raises(ValueError, match=r"domain .z.: its test images .*\(in another order\)"):
        partition(TRAIN, TESTS | {"z": images(8, classes=("b", "a", "c"))}, seed=0)
    with pytest.raises(ValueError, match="no domain to partition"):
        partition({}, {}, seed=0)


def test_office_caltech_10_has_the_published_sizes(real_data):
    root = real_data / "office_caltech_10"
    if not root.is_dir():
        pytest.skip(f"needs Office-Caltech-10 in {root}")
    federation = partition(
        open_domains(root, "train"),
        open_domains(root, "test"),
        seed=0,
        partitioner=Slices(),
        images_per_client=62,
        validation_images=50,
    )
    assert [len(images) for images in federation.tests.values()] == [192, 225, 32, 59]
    assert [(len(client.train), len(client.validation)) for client in federation.clients] == [(62, 50)] * 4
    for client in federation.clients:
        files = [
            {part.source(i) for i in range(len(part))}
            for part in (client.train, client.validation, federation.tests[client.domain])
        ]
        assert len(set.union(*files)) == sum(map(len, files))
        assert all(f"/{client.domain}/" in path for path in set.union(*files))
        assert client.train.image(0).shape[0] == 3
