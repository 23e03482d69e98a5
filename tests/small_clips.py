"""Small clips in files, as people have them: numbered grey frames, or a bright bar that moves to the left or to the right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("left", "right")


def numbered(count: int, *, width: int = 32, height: int = 24, step: int = 8) -> list[NDArray[np.uint8]]:
    """Frame i is grey of value `8 i`, so that a decoded frame tells its number."""
    return [np.full((height, width, 3), step * number, dtype=np.uint8) for number in range(count)]


def moving_bar(label: int, *, count: int = 8, size: int = 16, seed: int = 0) -> list[NDArray[np.uint8]]:
    """A bright bar on noise that moves two pixels per frame and comes back on the other side."""
    random = np.random.default_rng(seed)
    start = random.integers(size)
    frames = []
    for number in range(count):
        frame = random.integers(0, 60, (size, size, 3)).astype(np.uint8)
        place = start + 2 * number * (1 if CLASSES[label] == "right" else -1)
        frame[:, [place % size, (place + 1) % size, (place + 2) % size]] = 220
        frames.append(frame)
    return frames


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]], *, codec: str = "mpeg4") -> Path:
    """Encode the frames by PyAV, in high quality."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_frames(folder: Path, frames: Sequence[NDArray[np.uint8]], *, first: int = 1) -> Path:
    """A folder with a picture for each frame: 1.png, 2.png, ..., 10.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, first):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


def write_clips(root: Path, *, train: int = 16, test: int = 8, size: int = 16) -> Path:
    """`train/<class>/*.mp4` and `test/<class>/<clip>/*.png`: bars that move to the left or to the right."""
    for index in range(train):
        write_video(
            root / "train" / CLASSES[index % 2] / f"{index:03}.mp4", moving_bar(index % 2, size=size, seed=index)
        )
    for index in range(test):
        frames = moving_bar(index % 2, size=size, seed=1000 + index)
        write_frames(root / "test" / CLASSES[index % 2] / f"{index:03}", frames)
    return root
