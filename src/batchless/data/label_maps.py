"""Images with a label map: the class of every pixel, some of them ignored."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from batchless.data.folders import read_image

IGNORED = 255
"""Label of a pixel that is neither learned nor evaluated."""

IGNORED_NAME = "ignored"
"""In `classes.txt`, of a colour that is neither learned nor evaluated."""

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

_UNKNOWN = -1
_VALUES = 256
_FORMATS = ("PNG", "BMP", "TIFF", "GIF")  # JPEG would change the values


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedImage:
    """An image and where its label map is.

    Attributes:
        source: names the image in errors: its path, or words.
        read: gives the image, uint8 `[3, H, W]`; ValueError naming it if it cannot be read.
        map_source: names the map.
        read_map: gives the map as it is stored, uint8 `[H, W]`; ValueError naming it.
    """

    source: str
    read: Callable[[], Tensor]
    map_source: str
    read_map: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelMaps:
    """A data set of images with label maps.

    Attributes:
        images: in order.
        classes: K names, in the order of the labels; at most 255.
        table: int16 `[256]`: the label of each stored value, 255 for an ignored one, -1 for one that is not known.
        found: how often something called for a decision, such as `images without a label map, left out`.
    """

    images: tuple[MappedImage, ...]
    classes: tuple[str, ...]
    table: Tensor
    found: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.images)

    def notes(self) -> list[str]:
        """What was found, a line each."""
        return [f"{count} {what}" for what, count in sorted(self.found.items()) if count]

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """The image uint8 `[3, H, W]`, and its labels uint8 `[H, W]`, 255 where ignored.

        Raises:
            ValueError: naming the file: unreadable, of another size than the other, or with a value that is no class.
        """
        files = self.images[index]
        image, stored = files.read(), files.read_map()
        if image.shape[1:] != stored.shape:
            raise ValueError(
                f"{files.map_source}: the label map is {stored.shape[1]}x{stored.shape[0]} pixels, its image "
                f"{files.source} {image.shape[2]}x{image.shape[1]}: put the right file there"
            )
        labels = self.table[stored.long()]
        if bool((unknown := labels == _UNKNOWN).any()):
            value = int(stored[unknown][0])
            ignored = [number for number in range(_VALUES) if self.table[number] == IGNORED]
            raise ValueError(
                f"{files.map_source}: {int((stored == value).sum())} pixels have the value {value}, which is none of the "
                f"{len(self.classes)} classes and not ignored ({_some(ignored)}): correct the map, or add the value to "
                "segment.ignore"
            )
        return image, labels.to(torch.uint8)

    def source(self, index: int) -> str:
        """Where the image comes from."""
        return self.images[index].source


def _some(values: list[int]) -> str:
    text = ", ".join(map(str, values[:5]))
    return (f"{text}, ..." if len(values) > 5 else text) or "no value is"


def label_table(labels: Mapping[int, int], ignore: Iterable[int]) -> Tensor:
    """The table of `LabelMaps`: stored values with their labels, and those that are ignored.

    >>> label_table({0: 0, 7: 1}, [255])[[0, 7, 8, 255]].tolist()
    [0, 1, -1, 255]
    """
    table = torch.full((_VALUES,), _UNKNOWN, dtype=torch.int16)
    for value, label in labels.items():
        table[value] = label
    for value in ignore:
        table[value] = IGNORED
    return table


def read_label_map(path: str | Path) -> Tensor:
    """The values in an image of one channel, or of a palette, as they are stored: uint8 `[H, W]`.

    An image of three equal channels counts as one channel.

    Raises:
        ValueError: naming the file: missing, damaged, with colours, or with values above 255.
    """
    values = _decoded(path)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise ValueError(
                f"{path}: this label map has colours: tell their classes by lines `name red green blue` in classes.txt, or "
                "save the number of each pixel's class instead"
            )
        values = values[..., 0]
    if values.dtype != np.bool_ and values.max(initial=0) > IGNORED:
        raise ValueError(f"{path}: this label map has the value {values.max()}, where 0 to {IGNORED} are possible")
    return torch.from_numpy(values.astype(np.uint8))


def read_coloured_map(path: str | Path, palette: Mapping[Colour, int]) -> Tensor:
    """The numbers in an image of colours: uint8 `[H, W]`.

    Args:
        path: of an image of three channels; or of one channel, which counts as three equal ones; or of a palette.
        palette: the number of each colour, 0 to 255.

    Raises:
        ValueError: naming the file: missing or damaged; or the first colour that the palette has not, and where it is.
    """
    colours = _decoded(path, colours=True).astype(np.int64)
    keys = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    numbers = np.full(keys.shape, _UNKNOWN, np.int16)
    for (red, green, blue), number in palette.items():
        numbers[keys == (red << 16 | green << 8 | blue)] = number
    if (unknown := numbers == _UNKNOWN).any():
        top, left = (int(place) for place in np.argwhere(unknown)[0])
        told = " ".join(str(value) for value in colours[top, left])
        raise ValueError(
            f"{path}: {int(unknown.sum())} pixels have colours that no line of classes.txt names, first {told} (red green "
            f"blue) in row {top}, column {left}: add a line `name {told}`, or `{IGNORED_NAME} {told}` if it is to be ignored"
        )
    return torch.from_numpy(numbers.astype(np.uint8))


def _decoded(path: str | Path, *, colours: bool = False) -> NDArray[Any]:
    """The values as they are stored, `[H, W]`, or `[H, W, 3]`; with `colours` always these, as they are shown."""
    stored = () if colours else ("1", "L", "P", "I", "I;16")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as file:
                return np.array(file if file.mode in (*stored, "RGB") else file.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as a label map ({reason}); replace or remove this file") from error


def mapped_files(image: Path, label_map: Path, palette: Mapping[Colour, int] | None = None) -> MappedImage:
    """An image and its map in files, a map of colours if there is a palette."""
    read_map = read_label_map if palette is None else partial(read_coloured_map, palette=palette)
    return MappedImage(
        source=str(image),
        read=_Read(read_image, image),
        map_source=str(label_map),
        read_map=_Read(read_map, label_map),
    )


@dataclass(frozen=True)
class _Read:
    """Reads a file; workers can be given it."""

    reader: Callable[[Path], Tensor]
    path: Path

    def __call__(self) -> Tensor:
        return self.reader(self.path)
