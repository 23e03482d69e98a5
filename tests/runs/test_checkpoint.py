import errno
import io
import os
import pickle

import pytest
import torch
from torch import nn

from batchless.runs import RunFolder, load_checkpoint, load_model_state

torch.set_num_threads(1)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


class Full(io.BytesIO):
    """A file on a disk that is full after so many bytes."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", config={}, seed=0)


def network(width=4, classes=3):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, classes))


def test_a_checkpoint_comes_back_bit_for_bit(run):
    torch.manual_seed(0)
    model = network()
    state = {
        "model": model.state_dict(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        "images": 12,
    }
    path = run.save_checkpoint("last", state)
    assert path == run.path / "checkpoints" / "last.pt"
    back = load_checkpoint(path)
    assert back["images"] == 12
    assert back["optimizer"] == state["optimizer"]
    assert all(torch.equal(value, back["model"][key]) for key, value in model.state_dict().items())


def test_a_new_checkpoint_takes_the_place_of_the_earlier_one(run):
    for images in (1, 2):
        path = run.save_checkpoint("last", {"images": images})
    assert load_checkpoint(path) == {"images": 2}
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_keeps_the_earlier_checkpoint(run, monkeypatch, earlier):
    if earlier:
        run.save_checkpoint("last", {"images": 1})

    def save(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        words = "the earlier checkpoint there is intact" if earlier else "no checkpoint was there before"
        with pytest.raises(ValueError, match=rf"last\.pt: No space left on device; {words}$"):
            run.save_checkpoint("last", {"images": 2})
    files = [file.name for file in (run.path / "checkpoints").iterdir()]
    assert files == (["last.pt"] if earlier else [])
    if earlier:
        assert load_checkpoint(run.path / "checkpoints" / "last.pt") == {"images": 1}


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_a_disk_that_fills_up_inside_torchs_writer(run, monkeypatch, room):
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: real(state, Full(room)))
    with pytest.raises(ValueError, match=r"last\.pt: No space left on device"):
        run.save_checkpoint("last", {"w": torch.zeros(50_000)})


def test_errors_that_are_not_the_disks_are_not_called_a_full_disk(run, monkeypatch):
    def save(state, file):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="something else"):
        run.save_checkpoint("last", {})


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(run):
    run.save_checkpoint("last", {})
    folder = run.path / "checkpoints"
    for name in (".last.pt.123-abc.tmp", ".best.pt.123-abc.tmp", "notes.tmp"):
        (folder / name).write_bytes(b"half")
    run.save_checkpoint("last", {})
    assert sorted(file.name for file in folder.iterdir()) == [".best.pt.123-abc.tmp", "last.pt", "notes.tmp"]


@pytest.mark.parametrize("name", ["", "a/b", "../last", "..", ".hidden", "/last"])
def test_names_that_leave_the_folder_are_refused(run, name):
    with pytest.raises(ValueError, match="a checkpoint's name is one word"):
        run.save_checkpoint(name, {})


def test_a_missing_checkpoint_says_which_there_are(run, tmp_path):
    run.save_checkpoint("last", {})
    with pytest.raises(ValueError, match=r"there is no checkpoint .*best\.pt; in .*checkpoints there is: last\.pt"):
        load_checkpoint(run.path / "checkpoints" / "best.pt")
    with pytest.raises(ValueError, match=r"holds no \.pt file"):
        load_checkpoint(tmp_path / "nowhere" / "best.pt")


def test_a_truncated_checkpoint_of_any_length(run):
    path = run.save_checkpoint("last", {"w": torch.arange(300.0)})
    whole = path.read_bytes()
    for end in [*range(0, 40), *range(40, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"last\.pt is not a checkpoint, or is truncated") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"hello world\n" * 20, b"\xff\xd8\xff\xe0" + b"abc" * 99, b"PK\x03\x04", b"\x80\x02."]
)
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt is not a checkpoint, or is truncated or damaged") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.pt"
    torch.save({"model": RunsCode()}, file)
    with pytest.raises(ValueError, match=r"a\.pt was not loaded: it holds \w+\.mkdir, which could run code") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps({"model": RunsCode()}, protocol=protocol))
        with pytest.raises(ValueError, match=r"a\.pt (was not loaded|is not a checkpoint)") as caught:
            load_checkpoint(file)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_a_whole_module_is_refused_with_its_class(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt was not loaded: it holds torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_that_is_no_dict(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"it holds a list, not a dict"):
        load_checkpoint(tmp_path / "a.pt")


def test_loading_the_state_of_the_same_network():
    torch.manual_seed(0)
    source, target = network(), network()
    load_model_state(target, source.state_dict(), source="a.pt")
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {key: value for key, value in state.items() if not key.startswith("1.")},
            r"^a\.pt is a checkpoint of another network: keys 5 missing \(first: 1\.weight\); "
            r"build the model with the same model name and normalizer",
        ),
        (
            lambda state: {**state, "extra": torch.zeros(1)},
            r"keys 1 unexpected \(first: extra\); build",
        ),
        (
            lambda state: {**state, "3.weight": torch.zeros(7, 4), "3.bias": torch.zeros(7)},
            r"keys 2 of another shape \(first: 3\.weight is \[7, 4\] there, \[3, 4\] in the model\); .*of classes",
        ),
        (
            lambda state: {f"module.{key}": value for key, value in state.items()},
            r"keys 9 missing .*, 9 unexpected \(first: module\.0\.weight\); .*remove the prefix 'module\.'",
        ),
        (
            lambda state: {"model": state, "epoch": 3},
            r"it is a whole checkpoint, not a model's state: pass its entry 'model'",
        ),
        (
            lambda state: {**state, "3.bias": 1.0},
            r"1 of another shape \(first: 3\.bias is float there, \[3\] in the model\)",
        ),
        (lambda state: {**state, 3: 1}, r"1 unexpected \(first: 3\)"),
    ],
)
def test_another_network_is_one_line_and_changes_nothing(change, message):
    torch.manual_seed(0)
    model, other = network(), network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_model_state(model, change(other.state_dict()), source="a.pt")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
