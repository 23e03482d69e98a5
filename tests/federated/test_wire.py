"""What travels: orders, answers and arrays, and what is refused of them."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from domain_runs import config
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import same_bits

from batchless.federated import FederateConfig, FederatedDataSettings
from batchless.federated.flower_settings import config_of, run_config_of, site_of
from batchless.federated.update import ClientFailedError, Update, failed
from batchless.federated.wire import (
    Answer,
    Order,
    figures_text,
    read_array,
    read_figures,
    sent_tensors,
    with_sent,
)

LIKE = torch.zeros(2, 3)
ORDER = Order(
    run="0123456789abcdef", round=2, config=config("fedbn", Path("d"), Path("o")), clients={3: 0, 1: 2}, domains=("a",)
)


def npy(array: np.ndarray, **named: bool) -> bytes:
    file = BytesIO()
    np.save(file, array, **named)
    return file.getvalue()


def test_an_updates_tensors_come_back():
    update = Update(
        weight=3.0, values={"w": torch.randn(2), "b": torch.randn(3).double()}, counters={"n": torch.tensor(7)}
    )
    again = with_sent(Update(weight=3.0), sent_tensors(update))
    assert same_bits(again.values, update.values)
    assert same_bits(again.counters, update.counters)
    assert again.weight == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64, torch.uint8])
def test_arrays_come_back(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert same_bits({"x": tensor}, {"x": read_array(npy(tensor.numpy()), name="x", like=tensor)})
    scalar = torch.tensor(5).to(dtype)
    assert same_bits({"x": scalar}, {"x": read_array(npy(scalar.numpy()), name="x", like=scalar)})


def claiming(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(24)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((3, 2), np.float32)), r"w has the shape \(3, 2\), here it is \(2, 3\)"),
        (claiming("(1000000000, 1000000000)"), r"w has the shape \(1000000000, 1000000000\), here"),
        (claiming("(-1, 3)"), r"w has the shape \(-1, 3\)"),
        (npy(np.zeros((2, 3), np.float16)), "w has the type float16, here it is float32"),
        (npy(np.zeros((2, 3), np.float64)), "w has the type float64, here it is float32"),
        (npy(np.array([[{}] * 3] * 2), allow_pickle=True), "w has the type object"),
        (npy(np.zeros((2, 3), np.float32))[:-4], "w has 20 bytes, 24 are expected"),
        (npy(np.zeros((2, 3), np.float32)) + b"more", "w has 28 bytes, 24 are expected"),
        (npy(np.asfortranarray(np.zeros((2, 3), np.float32))), "w has 24 bytes"),
        (b"", "w is no array"),
        (b"\x80\x04\x95 a pickle", "w is no array"),
        (claiming("__import__('os')"), "w is no array"),
        (claiming("(" * 3000), "w is no array"),
    ],
)
def test_other_arrays_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_array(data, name="w", like=LIKE)


@given(data=st.binary(max_size=200), valid=st.booleans())
def test_any_bytes_are_a_clear_error(data, valid):
    with pytest.raises(ValueError, match=r"^w "):
        read_array(b"\x93NUMPY\x01\x00" * valid + data, name="w", like=LIKE)


def test_orders_and_answers_come_back():
    assert Order.read(ORDER.text()).text() == ORDER.text()
    update = Update(weight=5.0, images=5, seconds=0.25, metrics={"pale": {"loss": (1.5, 5.0)}})
    again = Answer.read(Answer(update=update, began_anew=True).text(), client=4, domain="pale")
    assert (again.update.metrics, again.update.images, again.update.weight) == (update.metrics, 5, 5.0)
    assert again.began_anew
    left_out = Answer(update=failed(ClientFailedError(4, "no disk")))
    assert Answer.read(left_out.text(), client=4, domain="pale").update.left_out == left_out.update.left_out
    figures = {3: {"loss": 0.1, "accuracy": float("nan")}, "pale": {"loss": 1e-30}}
    assert repr(read_figures(figures_text(figures))) == repr(figures)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        ORDER.text().replace("0123456789abcdef", "../../../../etc"),
        ORDER.text().replace('"round": 2', '"round": -1'),
        ORDER.text().replace('"round": 2', '"round": "2"'),
        ORDER.text().replace("[3, 0]", "[3, 0, 1]"),
        ORDER.text().replace("[3, 0]", '["../3", 0]'),
        ORDER.text().replace('"fedbn"', '"fedbm"'),
        ORDER.text().replace('"rounds"', '"round_s"'),
    ],
)
def test_other_orders_are_refused(text):
    with pytest.raises(ValueError, match="no order of a server of this version"):
        Order.read(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "{}",
        '{"weight": NaN, "images": 1, "seconds": 1, "metrics": {"loss": [1, 1]}, "began_anew": false}',
        '{"weight": 1, "images": -1, "seconds": 1, "metrics": {"loss": [1, 1]}, "began_anew": false}',
        '{"weight": 1, "images": 1, "seconds": 1, "metrics": {"loss": [1]}, "began_anew": false}',
        '{"weight": 1, "images": 1, "seconds": 1, "metrics": {}, "began_anew": false}',
        '{"weight": 1, "images": Infinity, "seconds": 1, "metrics": {"loss": [1, 1]}, "began_anew": false}',
        "{" * 100_000,
    ],
)
def test_other_answers_are_refused(text):
    with pytest.raises(ValueError, match="sent an answer that cannot be read"):
        Answer.read(text, client=0, domain="pale")


@pytest.mark.parametrize(
    "text", ["", "7", '[["a", 1]]', '[["a", {"loss": "x"}]]', '[["a", {"kind": 1}]]', "[" * 100_000]
)
def test_other_figures_are_refused(text):
    with pytest.raises(ValueError, match="sent figures that cannot be read"):
        read_figures(text)


@given(
    algorithm=st.sampled_from(["fedbn", "fedavg"]),
    rounds=st.integers(1, 50),
    domains=st.none() | st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True).map(tuple),
    rate=st.floats(1e-6, 1.0),
)
def test_flowers_run_configuration_says_the_same(algorithm, rounds, domains, rate):
    data = FederatedDataSettings(domains=domains, root="da ta", flip=True)
    asked = config(algorithm, Path("d"), Path("o"), rounds=rounds, engine="flower", fraction=rate)
    asked = FederateConfig(**{**vars(asked), "data": data, "normalizer": asked.resolved_normalizer()})
    assert config_of(run_config_of(asked)) == asked


def test_mistakes_in_flowers_configurations():
    with pytest.raises(ValueError, match=r"there is no setting data\.foo"):
        config_of({"data.foo": 1})
    with pytest.raises(ValueError, match=r"there is no setting rounds\.more"):
        config_of({"rounds.more": 1})
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        config_of({"rounds": 0})
    with pytest.raises(ValueError, match="--node-config has 'partition'"):
        site_of({"partition": 1})
    for wrong in ({}, {"partition-id": "a"}, {"partition-id": ""}):
        with pytest.raises(ValueError, match="--node-config needs the clients of this node"):
            site_of(wrong)
    assert site_of({"partition-id": "0,3", "num-partitions": 4}).clients == {0, 3}
    assert site_of({"partition-id": 2, "data-root": "d"}).root == "d"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unseen": "mean", "algorithm": "fedbn"}, "unseen=mean needs all clients' layers"),
        ({"checkpoint_rounds": 2}, "every round is saved: checkpoint_rounds must be 1"),
        ({"engine": "ray"}, "engine must be processes or flower"),
        ({"data.unseen_domains": "[pale]", "algorithm": "standalone"}, "unseen_domains are evaluated by the server"),
        ({"flower.server_has_data": False}, "has to be told data.domains and data.classes"),
        ({"flower.nodes": 0}, "flower.nodes must be 1 or more"),
        ({"flower.round_timeout": -1.0}, "flower.round_timeout must be 0 or more"),
    ],
)
def test_what_flower_cannot_do_is_told_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(changes)
