import gc
import multiprocessing
import os
import random
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchless.data import Augment, ChannelStatistics, Mix, PooledImages, batches, epoch_order, open_images
from batchless.data.augment import centred
from batchless.data.dataset import Subset
from batchless.data.folders import FolderImages
from batchless.data.memory import TensorImages

PLAIN = ChannelStatistics(mean=(0, 0, 0), std=(1, 1, 1))
DEFAULTS = {"seed": 1, "epoch": 2, "image_size": 8, "augment": None, "mean_std": PLAIN}
AUGMENTS = {
    "none": None,
    "pad and crop": Augment(),
    "resized crop": Augment(random_resized_crop=True),
    "everything": Augment(rand_augment=2, color_jitter=0.4, erasing=0.5),
}
# DataLoader advises against more workers than cores; the tests are about values.
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@dataclass(frozen=True)
class Noise:
    """Images of random sizes; image i is a function of i."""

    length: int = 11
    classes: tuple[str, ...] = ("a", "b", "c")

    def __len__(self):
        return self.length

    def image(self, index):
        rng = np.random.default_rng(index)
        return torch.from_numpy(rng.integers(0, 256, (3, *rng.integers(5, 20, 2)), dtype=np.uint8))

    def label(self, index):
        return index % 3

    def source(self, index):
        return f"noise {index}"


def split(indices, size=4):
    """The indices in micro-batches of `size`, the last one of what is left."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def load(dataset=None, micro_batches=None, **settings):
    dataset = Noise() if dataset is None else dataset
    micro_batches = split(range(len(dataset))) if micro_batches is None else micro_batches
    return list(batches(dataset, micro_batches, **DEFAULTS | settings))


def joined(parts):
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


@given(length=st.integers(0, 200), seed=st.integers(), epoch=st.integers(0, 10**6))
def test_an_order_is_a_permutation(length, seed, epoch):
    order = epoch_order(length, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(length))
    assert order == epoch_order(length, seed=seed, epoch=epoch)


def test_orders_of_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@given(sizes=st.lists(st.integers(1, 5), max_size=5))
def test_every_batch_is_as_planned(sizes):
    plan = [list(range(size)) for size in sizes]
    parts = load(micro_batches=plan)
    assert [images.shape for images, _ in parts] == [(size, 3, 8, 8) for size in sizes]
    assert [labels.tolist() for _, labels in parts] == [[index % 3 for index in indices] for indices in plan]


@pytest.mark.parametrize("mix", [None, Mix(mixup=1, cutmix=1, probability=0.8)], ids=["plain", "mixed"])
@pytest.mark.parametrize("name", AUGMENTS)
def test_a_sample_depends_on_seed_epoch_and_index_alone(name, mix):
    order = epoch_order(11, seed=1, epoch=2)
    settings = {"augment": AUGMENTS[name], "mix": mix}
    images, labels = joined(load(micro_batches=split(order), **settings))
    assert images.dtype == torch.float32
    for plan, expected in (
        (split(order, 1), range(11)),
        (split(order)[1:], range(4, 11)),
        (split(order[::-1], 3), range(10, -1, -1)),
        ([order[:1], order[1:8], order[8:]], range(11)),
    ):
        others, other_labels = joined(load(micro_batches=plan, **settings))
        assert torch.equal(images[list(expected)], others)
        assert torch.equal(labels[list(expected)], other_labels)


@few_cores
@pytest.mark.parametrize("mix", [None, Mix(cutmix=1)], ids=["plain", "mixed"])
@pytest.mark.parametrize("name", ["none", "everything"])
def test_workers_change_nothing(name, mix):
    before = torch.get_rng_state()
    settings = {"augment": AUGMENTS[name], "mix": mix}
    for (images, labels), (others, other_labels) in zip(load(**settings), load(**settings, workers=2), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["pad and crop", "resized crop", "everything"])
def test_seeds_and_epochs_change_the_samples(name):
    views = [
        joined(load(seed=seed, epoch=epoch, augment=AUGMENTS[name]))[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(views[one], views[other])


@pytest.mark.parametrize("name", AUGMENTS)
def test_the_global_random_state_is_neither_read_nor_changed(name):
    settings = {"augment": AUGMENTS[name], "mix": Mix(mixup=1, cutmix=1)}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, _ = joined(load(**settings))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(99)
    assert torch.equal(first, joined(load(**settings))[0])


def test_no_process_is_started_without_workers(monkeypatch):
    monkeypatch.setattr("batchless.data.loading.DataLoader", None)
    assert len(load()) == 3


def test_images_are_normalized():
    statistics = ChannelStatistics(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    plain, _ = joined(load())
    images, _ = joined(load(mean_std=statistics))
    expected = (plain.double() - torch.tensor(statistics.mean)[:, None, None]) / torch.tensor(statistics.std)[
        :, None, None
    ]
    torch.testing.assert_close(images.double(), expected, rtol=1e-6, atol=1e-6)


def test_images_of_the_right_size_are_only_scaled_when_evaluating():
    images = open_images(None, "test")
    loaded, _ = joined(load(images, split(range(5)), image_size=32))
    assert torch.equal((loaded * 255).round().to(torch.uint8), torch.stack([images.image(i) for i in range(5)]))


@given(
    channels=st.sampled_from([1, 3]),
    side=st.sampled_from([8, 9]),
    chosen=st.permutations(range(7)),
    cut=st.integers(1, 7),
)
def test_images_in_memory_come_in_one_piece_as_one_by_one(channels, side, chosen, cut):
    images = torch.arange(7 * channels * side * side).remainder(251).to(torch.uint8).view(7, channels, side, side)
    held = TensorImages(images=images, labels=(0,) * 7, classes=("a",), origins=(("memory", 7),))
    part = Subset(dataset=Subset(dataset=held, indices=tuple(chosen)), indices=tuple(range(cut)))
    # A pool is asked for its images one by one.
    for dataset in (held, part):
        assert_equal_batches(load(dataset), load(PooledImages(parts=(dataset,))))
    assert torch.equal(images, torch.arange(images.numel()).remainder(251).to(torch.uint8).view_as(images))


def assert_equal_batches(left, right):
    assert len(left) == len(right)
    for (images, labels), (others, other_labels) in zip(left, right, strict=True):
        assert images.is_contiguous()
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_evaluation_can_resize_to_more_than_it_shows():
    images, _ = joined(load(resize_to=16))
    expected = torch.stack([centred(Noise().image(index), 8, resize_to=16) for index in range(11)])
    assert torch.equal((images * 255).round().to(torch.uint8), expected)


def test_erased_parts_have_the_mean_colour():
    settings = {
        "mean_std": ChannelStatistics(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)),
        "micro_batches": [range(9)] * 40,
    }
    plain, _ = joined(load(augment=Augment(erasing=0), **settings))
    erased, _ = joined(load(augment=Augment(erasing=1), **settings))
    changed = (plain != erased).any(dim=1)
    assert (erased.permute(0, 2, 3, 1)[changed] == 0).all()
    assert 0.02 < changed.float().mean() < 0.33
    assert changed.any(dim=(1, 2)).all()
    few, _ = joined(
        load(augment=Augment(erasing=0.25), **settings | {"micro_batches": [range(400)]}, dataset=Noise(400))
    )
    all_of_them, _ = joined(load(augment=Augment(), **settings | {"micro_batches": [range(400)]}, dataset=Noise(400)))
    assert 70 < (few != all_of_them).any(dim=(1, 2, 3)).sum() < 130


@few_cores
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line(tmp_path, workers):
    for number in range(4):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    dataset = FolderImages(files=tuple((str(tmp_path / f"{number}.png"), 0) for number in range(4)), classes=("a",))
    iterator = batches(dataset, [[0], [1], [2], [3]], **DEFAULTS, workers=workers)
    assert next(iterator)[0].shape == next(iterator)[0].shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^\S*2\.png: cannot be read as an image \([^\n]*$"):
        next(iterator)
    assert not multiprocessing.active_children()


@few_cores
def test_workers_end_when_the_loop_is_left_early():
    iterator = batches(Noise(40), split(range(40), 1), **DEFAULTS, workers=2)
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    del iterator
    assert not multiprocessing.active_children()


@few_cores
def test_workers_end_when_the_loop_fails():
    def loop():
        for _ in batches(Noise(40), split(range(40), 1), **DEFAULTS, workers=2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    gc.collect()
    assert not multiprocessing.active_children()


@few_cores
def test_workers_leave_interrupts_to_their_parent():
    iterator = batches(Noise(40), split(range(40), 1), **DEFAULTS, workers=2)
    first = [next(iterator) for _ in range(2)]  # one of each worker, so that both have begun
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    assert len([*first, *iterator]) == 40


# torch tells of a dead worker in a signal handler, which raises wherever the main thread is: also in a destructor.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@few_cores
def test_a_killed_worker_is_one_line(monkeypatch):
    def image(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(Noise, "image", image)
    message = r"^a process that prepares batches ended \([^\n]+\): use fewer workers, or workers=0$"
    with pytest.raises(ValueError, match=message):
        load(micro_batches=split(range(11), 1), workers=1)


@few_cores
@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError, ConnectionError, EOFError])
def test_an_error_of_the_dataset_is_no_dead_worker(monkeypatch, kind):
    def image(self, index):
        raise kind("of the dataset's own")

    monkeypatch.setattr(Noise, "image", image)
    with pytest.raises(kind, match="of the dataset's own"):
        load(workers=1)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(label, monkeypatch):
    monkeypatch.setattr(Noise, "label", lambda self, index: label if index == 4 else 0)
    with pytest.raises(ValueError, match=rf"noise 4: label {label} is out of range, there are 3 classes \(0 to 2\)"):
        load()


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(8, 8).byte()]
)
def test_a_dataset_that_breaks_the_protocol_is_named(image, monkeypatch):
    monkeypatch.setattr(Noise, "image", lambda self, index: image)
    with pytest.raises(ValueError, match=r"noise 0: the dataset gives torch\.\w+ \[.*\] for this image"):
        load()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 0}, "image_size=0: give 1 or more"),
        ({"workers": -1}, "workers=-1: give 0 or more"),
        ({"micro_batches": [[1], [0, 11]]}, "micro-batch 1 has indices from 0 to 11 in a dataset of 11"),
        ({"micro_batches": [[-1, 3]]}, "micro-batch 0 has indices from -1 to 3 in a dataset of 11"),
        ({"micro_batches": [[0], []]}, "micro-batch 1 of 2 is empty"),
        ({"resize_to": 7}, "resize_to=7: the square cut out of it has image_size=8"),
        ({"dataset": Noise(1), "mix": Mix(mixup=1)}, "no other image to blend with in a dataset of 1"),
    ],
)
def test_arguments_are_checked_at_once(setting, message):
    with pytest.raises(ValueError, match=message):
        batches(**{"dataset": Noise(), "micro_batches": []} | DEFAULTS | setting)
