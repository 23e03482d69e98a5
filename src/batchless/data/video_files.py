"""Chosen frames of a clip: a video file, decoded by PyAV (FFmpeg), or a folder with a picture for each frame."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from batchless.data.folders import read_image

if TYPE_CHECKING:
    from av.container import InputContainer

Choose = Callable[[int], Sequence[int]]
"""`choose(length)`: which frames of a clip of so many are wanted, each from 0 to `length - 1`, in any order, some twice."""

VIDEO_EXTENSIONS = (
    ".mp4",
    ".avi",
    ".webm",
    ".mkv",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ts",
    ".ogv",
    ".3gp",
)

# Only formats that hold their frames themselves: a playlist (concat, HLS) would make FFmpeg open what it names.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,gif"
_MOST_PIXELS = 2**26  # of one frame: 8K video has 2^25
_LONGEST_SECONDS = 3600


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipFrames:
    """Chosen frames of a clip.

    Attributes:
        images: uint8 RGB `[T, 3, H, W]`, not to be written to.
        length: frames of the clip.
        damaged: whether a part of the clip could not be decoded; the frames are chosen from what could.
    """

    images: Tensor
    length: int
    damaged: bool = False


def read_clip(path: str | Path, choose: Choose) -> ClipFrames:
    """The chosen frames of a video file, or of a folder whose pictures are the frames, in the order of their names.

    Frames are counted by the file's packets, then decoded from the beginning up to the last one wanted, in the order in which
    they are shown, turned upright as the file says. What follows a damaged place is decoded where that is possible.

    Raises:
        ValueError: naming the file, in one line: missing, no video, without a frame that can be decoded, frames of more than
            67 million pixels or of several sizes, longer than an hour.
    """
    return _from_folder(Path(path), choose) if os.path.isdir(path) else _from_file(Path(path), choose)


def _clip(
    pictures: dict[int, Tensor], positions: Sequence[int], length: int, *, damaged: bool, path: Path
) -> ClipFrames:
    sizes = {tuple(picture.shape[1:]) for picture in pictures.values()}
    if len(sizes) > 1:
        raise ValueError(f"{path}: its frames have several sizes ({sorted(sizes)}); replace or remove this clip")
    images = torch.stack([pictures[position] for position in positions])
    return ClipFrames(images=images, length=length, damaged=damaged)


def _from_folder(folder: Path, choose: Choose) -> ClipFrames:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if is_picture(entry.name)]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror}); correct or remove this folder") from error
    if not names:
        raise ValueError(f"{folder}: no picture in this folder of frames (looked for {' '.join(IMG_EXTENSIONS)})")
    names.sort(key=_natural)
    positions = choose(len(names))
    pictures = {position: read_image(folder / names[position]) for position in set(positions)}
    return _clip(pictures, positions, len(names), damaged=False, path=folder)


def is_picture(name: str) -> bool:
    """Whether it is the name of a picture, not hidden."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def is_video(name: str) -> bool:
    """Whether it is the name of a video file, not hidden."""
    return name.lower().endswith(VIDEO_EXTENSIONS) and not name.startswith(".")


def clip_files(folder: Path) -> list[str]:
    """Paths of the clips of a class, sorted: the video files in a folder, and its subfolders that hold pictures.

    Subfolders without pictures are looked into. ValueError naming the folder if there is no clip in it.
    """
    found = _clips_below(folder)
    if not found:
        raise ValueError(
            f"{folder}: no clip in this class folder (looked for {' '.join(VIDEO_EXTENSIONS)}, and for folders of pictures);"
            " add clips, or remove the folder from both splits"
        )
    return sorted(found)


def _clips_below(folder: Path) -> list[str]:
    found = []
    try:
        with os.scandir(folder) as scanned:
            entries = [entry for entry in scanned if not entry.name.startswith(".")]
        for entry in entries:
            if not entry.is_dir():
                found += [entry.path] if is_video(entry.name) else []
            elif any(is_picture(name) for name in os.listdir(entry.path)):
                found.append(entry.path)
            else:
                found += _clips_below(Path(entry.path))
    except OSError as error:  # no permission, or a link that leads back to its own folder
        raise ValueError(
            f"{error.filename}: cannot be listed ({error.strerror}); correct or remove this folder"
        ) from error
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers: frame2 comes before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _from_file(path: Path, choose: Choose) -> ClipFrames:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video file, nor a folder of frames")
    try:
        length, damaged = _count(path)
        if not length:
            raise ValueError("not one frame is in it")
        found = _decoded(path, choose(length))
        if found.ended_after is not None:
            # Fewer frames than packets: damaged ones, or packets that show nothing. Choose among those there are.
            length = found.ended_after
            found = _decoded(path, choose(length)) if length else found
        positions = choose(length) if length else ()
        if not length or not set(positions) <= found.pictures.keys():
            raise ValueError(
                "not one frame of it can be decoded" if not length else "its frames cannot be decoded twice"
            )
        return _clip(found.pictures, positions, length, damaged=damaged or found.errors > 0, path=path)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        text = " ".join(str(error).split())
        if text.startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be read as a video ({text}); replace or remove this file") from error


def _opened(path: Path) -> "InputContainer":
    """A container of its own for each pass: what a decoder met on damaged places stays with it, even after a seek."""
    import av

    container = av.open(str(path), options={"format_whitelist": _FORMATS})
    try:
        if not container.streams.video:
            raise ValueError("there is no video stream in it")
        context = container.streams.video[0].codec_context
        if context is None:
            raise ValueError("its codec is not known")
        _check_size(context.width, context.height)
        context.thread_count = 1  # threads would be a set for each of the loader's workers
        seconds = 0 if container.duration is None else container.duration / av.time_base
        if seconds > _LONGEST_SECONDS:
            raise ValueError(f"it lasts {seconds:.0f} s, a clip is cut to at most {_LONGEST_SECONDS} s")
    except BaseException:
        container.close()
        raise
    return container


def _count(path: Path) -> tuple[int, bool]:
    """How many packets the video stream has, and whether the file announces more or ends within one."""
    import av

    packets = 0
    with _opened(path) as container:
        stream = container.streams.video[0]
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
        except av.error.FFmpegError:
            return packets, True
        return packets, packets < stream.frames


@dataclass(kw_only=True)
class _Decoded:
    pictures: dict[int, Tensor]
    errors: int = 0
    ended_after: int | None = None


def _decoded(path: Path, positions: Sequence[int]) -> _Decoded:
    """The frames at `positions`; `ended_after` is how many there are, if there are not enough."""
    wanted, found, number = set(positions), _Decoded(pictures={}), 0
    with _opened(path) as container:
        for frame in _frames(container, found):
            if number in wanted:
                found.pictures[number] = _picture(frame)
                if len(found.pictures) == len(wanted):
                    return found
            number += 1
    found.ended_after = number
    return found


def _frames(container: "InputContainer", found: _Decoded) -> Iterator[Any]:
    import av

    stream = container.streams.video[0]
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                found.errors += 1
    except av.error.FFmpegError:
        found.errors += 1


def _picture(frame: Any) -> Tensor:
    _check_size(frame.width, frame.height)
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    upright = np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))
    return torch.from_numpy(upright).permute(2, 0, 1)


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ValueError(f"frames of {width}x{height} pixels, at most {_MOST_PIXELS} are read")
