import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchless.data import Augment, ChannelStatistics, batches, epoch_order, open_images
from batchless.data.folders import FolderImages

PLAIN = ChannelStatistics(mean=(0, 0, 0), std=(1, 1, 1))
AUGMENTS = {
    "none": None,
    "pad and crop": Augment(),
    "resized crop": Augment(random_resized_crop=True),
}


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


def load(
    dataset=None,
    indices=None,
    *,
    images_per_forward=4,
    seed=1,
    epoch=2,
    image_size=8,
    augment=None,
    workers=0,
    mean_std=PLAIN,
):
    dataset = Noise() if dataset is None else dataset
    return list(
        batches(
            dataset,
            range(len(dataset)) if indices is None else indices,
            images_per_forward=images_per_forward,
            seed=seed,
            epoch=epoch,
            image_size=image_size,
            augment=augment,
            mean_std=mean_std,
            workers=workers,
        )
    )


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


@given(length=st.integers(0, 12), images_per_forward=st.integers(1, 14))
def test_nothing_is_dropped(length, images_per_forward):
    parts = load(Noise(length), images_per_forward=images_per_forward)
    sizes = [len(images) for images, _ in parts]
    assert sum(sizes) == length
    assert all(size == images_per_forward for size in sizes[:-1])
    assert all(images.shape == (size, 3, 8, 8) for size, (images, _) in zip(sizes, parts, strict=True))


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_sample_depends_on_seed_epoch_and_index_alone(name):
    order = epoch_order(11, seed=1, epoch=2)
    images, labels = joined(load(indices=order, augment=AUGMENTS[name], images_per_forward=4))
    assert images.dtype == torch.float32
    assert labels.tolist() == [index % 3 for index in order]
    single, _ = joined(load(indices=order, augment=AUGMENTS[name], images_per_forward=1))
    assert torch.equal(images, single)
    resumed, _ = joined(load(indices=order[6:], augment=AUGMENTS[name], images_per_forward=4))
    assert torch.equal(images[6:], resumed)
    backwards, _ = joined(load(indices=order[::-1], augment=AUGMENTS[name], images_per_forward=3))
    assert torch.equal(images.flip(0), backwards)


# DataLoader advises against more workers than cores; the test is about values.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("name", ["none", "pad and crop"])
def test_workers_change_nothing(name):
    before = torch.get_rng_state()
    for (images, labels), (others, other_labels) in zip(
        load(augment=AUGMENTS[name]), load(augment=AUGMENTS[name], workers=2), strict=True
    ):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["pad and crop", "resized crop"])
def test_seeds_and_epochs_change_the_samples(name):
    views = [
        joined(load(seed=seed, epoch=epoch, augment=AUGMENTS[name]))[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(views[one], views[other])


@pytest.mark.parametrize("name", AUGMENTS)
def test_the_global_random_state_is_neither_read_nor_changed(name):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, _ = joined(load(augment=AUGMENTS[name]))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(99)
    assert torch.equal(first, joined(load(augment=AUGMENTS[name]))[0])


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
    loaded, _ = joined(load(images, range(5), image_size=32))
    assert torch.equal((loaded * 255).round().to(torch.uint8), torch.stack([images.image(i) for i in range(5)]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line(tmp_path, workers):
    for number in range(4):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    dataset = FolderImages(files=tuple((str(tmp_path / f"{number}.png"), 0) for number in range(4)), classes=("a",))
    iterator = batches(
        dataset,
        range(4),
        images_per_forward=1,
        seed=0,
        epoch=0,
        image_size=8,
        augment=None,
        mean_std=PLAIN,
        workers=workers,
    )
    assert next(iterator)[0].shape == next(iterator)[0].shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^\S*2\.png: cannot be read as an image \([^\n]*$"):
        next(iterator)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_end_when_the_loop_is_left_early():
    import multiprocessing

    iterator = batches(
        Noise(40),
        range(40),
        images_per_forward=1,
        seed=0,
        epoch=0,
        image_size=8,
        augment=None,
        mean_std=PLAIN,
        workers=1,
    )
    next(iterator)
    assert multiprocessing.active_children()
    del iterator
    assert not multiprocessing.active_children()


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
        ({"images_per_forward": 0}, "images_per_forward=0: give 1 or more"),
        ({"image_size": 0}, "image_size=0: give 1 or more"),
        ({"workers": -1}, "workers=-1: give 0 or more"),
        ({"indices": [0, 11]}, "indices from 0 to 11 in a dataset of 11"),
        ({"indices": [-1, 3]}, "indices from -1 to 3 in a dataset of 11"),
    ],
)
def test_arguments_are_checked_at_once(setting, message):
    with pytest.raises(ValueError, match=message):
        load(**setting)
