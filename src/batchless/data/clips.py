"""What a dataset of clips is, and opening one in whichever layout it lies on disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from batchless.data.clip_lists import find_something, holds_lists, open_lists, open_something
from batchless.data.dataset import first_indices
from batchless.data.folders import existing_folder, held_out_folder, split_folders
from batchless.data.moving_digits import moving_digits
from batchless.data.video_files import Choose, ClipFrames, clip_files, read_clip

CLIP_LAYOUTS = (
    "folders (train/<class>/*.mp4 or .avi, .webm, ..., or train/<class>/<clip>/*.jpg, and test/, val/ or valid/ for test/)",
    "lists (train.csv and test.csv or val.csv, with a path and a label in each line; classes.txt)",
    "Something-Something V1 (something-something-v1-train.csv, ..., 20bn-something-something-v1/<id>/*.jpg)",
    "Something-Something V2 (something-something-v2-train.json or train.json, ..., 20bn-something-something-v2/<id>.webm)",
)


class ClipDataset(Protocol):
    """Labelled clips by index; datasets hold no random numbers, which come with `clip_batches`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""

    def __len__(self) -> int: ...

    def clip(self, index: int, choose: Choose) -> ClipFrames:
        """The frames that `choose` wants; ValueError naming the clip if it cannot be read."""

    def label(self, index: int) -> int:
        """The index of the clip's class in `classes`."""

    def source(self, index: int) -> str:
        """Names the clip in errors: a path, or words such as "moving digits test 17"."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipFiles:
    """Clips in video files or folders of frames, one (path, label) for each; decoded when a clip is asked for."""

    files: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def clip(self, index: int, choose: Choose) -> ClipFrames:
        """The frames that `choose` wants; ValueError naming the file if it cannot be read."""
        return read_clip(self.files[index][0], choose)

    def label(self, index: int) -> int:
        """The index of the clip's class in `classes`."""
        return self.files[index][1]

    def source(self, index: int) -> str:
        """The path."""
        return self.files[index][0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipSubset:
    """Some clips of a dataset, in a given order; index i of the subset is clip `indices[i]` of the dataset."""

    dataset: ClipDataset
    indices: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the dataset, all of them."""
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, index: int, choose: Choose) -> ClipFrames:
        """The frames that `choose` wants."""
        return self.dataset.clip(self.indices[index], choose)

    def label(self, index: int) -> int:
        """The index of the clip's class in `classes`."""
        return self.dataset.label(self.indices[index])

    def source(self, index: int) -> str:
        """Where the clip comes from, as the dataset says."""
        return self.dataset.source(self.indices[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipRelabelled:
    """A dataset whose classes are in another order: `labels[l]` is the label of what was of class `l`."""

    dataset: ClipDataset
    classes: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def clip(self, index: int, choose: Choose) -> ClipFrames:
        """The frames that `choose` wants."""
        return self.dataset.clip(index, choose)

    def label(self, index: int) -> int:
        """The index of the clip's class in `classes`."""
        return self.labels[self.dataset.label(index)]

    def source(self, index: int) -> str:
        """Where the clip comes from, as the dataset says."""
        return self.dataset.source(index)


def first_clips(clips: ClipDataset, n: int, *, seed: int) -> ClipSubset:
    """The first n clips of a seeded order, as `first_images` has it; ValueError if n is out of range."""
    labels = [clips.label(index) for index in range(len(clips))]
    return ClipSubset(dataset=clips, indices=first_indices(labels, n, seed=seed))


@dataclass(frozen=True, kw_only=True, eq=False)
class MiddleFrames:
    """The frame in the middle of every clip, as an `ImageDataset`: what a network knows that sees no motion."""

    clips: ClipDataset

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the clips."""
        return self.clips.classes

    def __len__(self) -> int:
        return len(self.clips)

    def image(self, index: int) -> Tensor:
        """The frame as uint8 `[3, H, W]`."""
        return self.clips.clip(index, middle).images[0]

    def label(self, index: int) -> int:
        """The index of the clip's class in `classes`."""
        return self.clips.label(index)

    def source(self, index: int) -> str:
        """Where the clip comes from."""
        return self.clips.source(index)


def middle(length: int) -> Sequence[int]:
    """The position of the frame in the middle of a clip of so many."""
    return (length // 2,)


def open_clips(root: str | Path | None, split: Literal["train", "test"]) -> ClipDataset:
    """The clips of a split of the dataset in `root`, whose layout is detected; None is the embedded moving handwriting.

    Layouts, in the order in which they are looked for: Something-Something V1 and V2, lists, folders. No clip is opened.
    ValueError, with the path and what is possible, if the folder is missing, in no known layout, or in disorder.

    >>> clips = open_clips(None, "test")
    >>> len(clips), clips.classes[clips.label(3)], clips.source(3)
    (720, 'down', 'moving digits test 3')
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: there are 'train' and 'test'")
    if root is None:
        return moving_digits(split)
    root = existing_folder(root, holding=CLIP_LAYOUTS)
    if found := find_something(root):
        return _files(*open_something(found, split))
    if holds_lists(root):
        return _files(*open_lists(root, split))
    if (root / "train").is_dir() and held_out_folder(root):
        folder, classes = split_folders(root, split)
        files = ((path, label) for label, name in enumerate(classes) for path in clip_files(folder / name))
        return _files(files, classes)
    raise ValueError(f"{root} holds no known layout of clips; possible are {'; or '.join(CLIP_LAYOUTS)}")


def _files(files: Iterable[tuple[str, int]], classes: tuple[str, ...]) -> ClipFiles:
    return ClipFiles(files=tuple(files), classes=classes)
