import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from batchless.data.cifar import open_cifar, read_pickle


def python2_string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def python2_int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def python2_list(items: list[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def python2_array(array: np.ndarray) -> bytes:
    """What cPickle of Python 2 writes for a uint8 matrix in protocol 2, opcode by opcode."""
    empty = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + b"U\x01b" + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + python2_string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03U\x01|NNN" + python2_int(-1) + python2_int(-1) + b"K\x00tb"
    shape = b"".join(python2_int(size) for size in array.shape) + b"\x86"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python2_string(array.tobytes()) + b"tb"


def python2_dict(items: dict[bytes, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(python2_string(key) + value for key, value in items.items()) + b"u."


def pixels(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10(folder: Path, *, count: int = 3, write=None) -> Path:
    """A CIFAR-10 folder with `count` images in each file, as Python 2 wrote it unless `write` pickles it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["plane", "car", "bird"]
    for number, name in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        data, labels = pixels(count, seed=number), [(number + i) % 3 for i in range(count)]
        if write:
            (folder / name).write_bytes(write({"data": data, "labels": labels}))
        else:
            ints = python2_list([python2_int(label) for label in labels])
            (folder / name).write_bytes(python2_dict({b"data": python2_array(data), b"labels": ints}))
    if write:
        (folder / "batches.meta").write_bytes(write({"label_names": names}))
    else:
        strings = python2_list([python2_string(name.encode()) for name in names])
        (folder / "batches.meta").write_bytes(python2_dict({b"label_names": strings, b"num_vis": python2_int(3072)}))
    return folder


def with_bytes_keys(content: dict) -> bytes:
    return pickle.dumps({key.encode(): value for key, value in content.items()}, protocol=2)


def old_numpy(content: dict) -> bytes:
    return pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")


WRITERS = {
    "python 2": None,
    "bytes keys": with_bytes_keys,
    "numpy.core": old_numpy,
    **{f"protocol {number}": lambda c, number=number: pickle.dumps(c, protocol=number) for number in range(6)},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_reads_what_each_python_writes(tmp_path, writer):
    root = write_cifar10(tmp_path / "cifar-10-batches-py", write=WRITERS[writer])
    train, test = open_cifar(root, "train"), open_cifar(root, "test")
    assert (len(train), len(test)) == (15, 3)
    assert train.classes == ("plane", "car", "bird")
    assert [train.label(i) for i in range(15)] == [(number + i) % 3 for number in range(5) for i in range(3)]
    for index in range(15):
        expected = pixels(3, seed=index // 3)[index % 3].reshape(3, 32, 32)
        assert torch.equal(train.image(index), torch.from_numpy(expected))
    assert torch.equal(test.image(2), torch.from_numpy(pixels(3, seed=5)[2].reshape(3, 32, 32)))
    assert train.source(7) == f"{root / 'data_batch_3'} image 1"


def test_cifar100_has_its_fine_classes(tmp_path):
    for name, count in (("train", 4), ("test", 2)):
        content = {"data": pixels(count), "fine_labels": [1] * count, "coarse_labels": [0] * count}
        (tmp_path / name).write_bytes(with_bytes_keys(content))
    meta = {"fine_label_names": [b"apple", b"baby"], "coarse_label_names": [b"thing"]}
    (tmp_path / "meta").write_bytes(with_bytes_keys(meta))
    test = open_cifar(tmp_path, "test")
    assert test.classes == ("apple", "baby")
    assert [test.label(i) for i in range(len(test))] == [1, 1]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("dtype", ["u1", "i4", "i8"])
def test_arrays_survive_the_restricted_reader(tmp_path, order, protocol, dtype):
    array = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)
    (tmp_path / "file").write_bytes(pickle.dumps({"data": array}, protocol=protocol))
    read = read_pickle(tmp_path / "file")["data"]
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)


class Hostile:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, open, getattr], ids=lambda function: function.__name__)
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, function, protocol):
    trace = tmp_path / "trace"
    arguments = {
        os.system: (f"touch {trace}",),
        eval: (f"open({str(trace)!r}, 'w')",),
        open: (str(trace), "w"),
        getattr: (os, "system"),
    }
    argument = arguments[function] if function is not getattr else ("text", "upper")
    (tmp_path / "file").write_bytes(pickle.dumps({"data": Hostile(function, *argument)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"file: not a CIFAR pickle \(it asks for .*refused\)"):
        read_pickle(tmp_path / "file")
    assert not trace.exists()


def test_the_hostile_pickle_would_run_elsewhere(tmp_path):
    """The test above proves nothing if its pickle is harmless."""
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Hostile(os.system, f"touch {trace}")))
    assert trace.exists()


def test_a_pickle_cannot_change_the_reader(tmp_path):
    # BUILD with a state (None, {attribute: value}) sets attributes on whatever is on the stack, functions included.
    build = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x0c__defaults__K\x01\x85s\x86b."
    (tmp_path / "file").write_bytes(build)
    with pytest.raises(ValueError, match="state for a function"):
        read_pickle(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([1.0]), "array of type 'f8'"),
        (np.array([{}], dtype=object), "array of type 'O8'"),
        (np.array([1], dtype=">i4"), "big-endian"),
    ],
)
def test_other_arrays_are_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(pickle.dumps({"data": content}, protocol=4))
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "file")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x80\x02}(", b"\x80\x02K\x01.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f"]
)
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S*/file: .*unpack the original archive") as caught:
        read_pickle(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_shape_that_does_not_fit_its_bytes_is_refused(tmp_path):
    whole = python2_dict({b"data": python2_array(pixels(1))})
    (tmp_path / "file").write_bytes(whole.replace(python2_int(3072), python2_int(10**9)))
    with pytest.raises(ValueError, match=r"shape \(1, 1000000000\) with 3072 values"):
        read_pickle(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": pixels(3), "labels": [0, 1]}, r"data_batch_2: 3 images but 2 labels"),
        (
            {"data": pixels(3), "labels": [0, 1, 3]},
            r"data_batch_2: label 3 of image 2 is out of range, there are 3 classes",
        ),
        ({"data": pixels(3), "labels": [0, -1, 2]}, r"data_batch_2: label -1 of image 1 is out of range"),
        ({"data": pixels(3), "labels": [0, "cat", 2]}, r"data_batch_2: label 'cat' of image 1 is no integer"),
        ({"data": pixels(3), "labels": "abc"}, r"data_batch_2: 3 images but labels of type str"),
        ({"data": pixels(3)[:, :100].copy(), "labels": [0, 1, 2]}, r"data_batch_2: data is uint8 \[3, 100\]"),
        ({"data": [1], "labels": [0]}, r"data_batch_2: data is list"),
        ({"labels": [0]}, r"data_batch_2: no data, there is \['labels'\]"),
        ({"data": pixels(0), "labels": []}, r"data_batch_2: no images"),
    ],
)
def test_files_in_disorder_are_named(tmp_path, content, message):
    root = write_cifar10(tmp_path)
    (root / "data_batch_2").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(ValueError, match=message):
        open_cifar(root, "train")


def test_labels_may_be_an_array(tmp_path):
    root = write_cifar10(tmp_path)
    (root / "test_batch").write_bytes(pickle.dumps({"data": pixels(2), "labels": np.array([2, 0])}, protocol=4))
    assert open_cifar(root, "test").labels == (2, 0)


@pytest.mark.parametrize("name", ["data_batch_4", "batches.meta"])
def test_a_missing_file_is_named(tmp_path, name):
    root = write_cifar10(tmp_path)
    (root / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        open_cifar(root, "train")


def test_a_meta_file_without_names_is_named(tmp_path):
    root = write_cifar10(tmp_path)
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [1, 2]}))
    with pytest.raises(ValueError, match=r"batches\.meta: no list of class names under 'label_names'"):
        open_cifar(root, "train")
