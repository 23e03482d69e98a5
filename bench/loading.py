"""Loading images and clips from files against learning from them, for each task, in one process without workers.

The files are cut from two real photos (scikit-learn's): JPEG of 500 x 375 px, as ImageNet's are in the mean, or MPEG-4 of
320 x 240 px. A loader whose loading takes f times as long as learning needs f workers to keep up.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from batchless.data.clip_sampling import FrameSampling
from batchless.data.folders import read_image
from batchless.data.label_maps import read_label_map
from batchless.models.detectors import DetectorSettings
from batchless.tasks import DataSettings, TrainConfig
from batchless.tasks.segment.settings import SegmentSettings
from batchless.tasks.setup import Setup, set_up
from batchless.tasks.trained import build_converted, build_plain
from batchless.train.waiting import advice_on_waiting
from bench.timing import Clock, Comparison, Contestant, Times, interleave

REPEATS = 8
CLASSES = ("china", "flower")
LEARN, LOAD = "forward and backward", "load"
Frame = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A task on files.

    Attributes:
        title: what is loaded and what learns from it.
        config: of the training.
        files: of the training images or clips.
        decode: one of them, to pixels.
    """

    title: str
    config: TrainConfig
    files: tuple[Path, ...]
    decode: Callable[[Path], object]


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """Each task's files decoded, loaded (decoded, augmented, batched) and learned from."""
    for written in (classification, detection, segmentation, video):
        with tempfile.TemporaryDirectory() as folder:
            workload = written(Path(folder))
            times = interleave(
                contestants(workload, seed=seed), repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round
            )
            yield Comparison(
                title=workload.title,
                base=LEARN,
                times=times,
                items=len(workload.files),
                notes=(waiting_note(times),),
            )


def waiting_note(times: Times) -> str:
    """How much of a training without workers is loading, by medians, and what to do where it is much."""
    load, learn = (float(np.median(times[name])) for name in (LOAD, LEARN))
    share = load / (load + learn)
    return advice_on_waiting(share, workers=0) or f"loading is {100 * share:.0f} % of a training without workers"


def contestants(workload: Workload, *, seed: int) -> dict[str, Contestant]:
    """Learning from all files' batches, loading these, and decoding alone; gradients are dropped."""
    setup: Setup[Any] = set_up(workload.config)
    torch.manual_seed(seed)
    model = build_converted(workload.config, build_plain(workload.config, num_classes=len(setup.classes)))[0].train()
    micro_batches = [[index] for index in setup.data.order(0)]
    batches = list(setup.data.train(0, micro_batches))

    def learn() -> None:
        for batch in batches:
            loss, count = setup.task.loss(model, batch)
            (loss / count).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return {
        LEARN: learn,
        LOAD: lambda: list(setup.data.train(0, micro_batches)),
        "of it: decode": lambda: [workload.decode(file) for file in workload.files],
    }


def classification(folder: Path, *, files: int = 8, model: str = "torchvision:resnet18", size: int = 224) -> Workload:
    """An image folder; random resized crops, mirrored."""
    for split in ("train", "test"):
        for index, picture in enumerate(photos(files, height=375, width=500)):
            write_jpeg(folder / split / CLASSES[index % 2] / f"{index}.jpg", picture)
    config = TrainConfig(
        model=model,
        normalizer="gn+ws",
        images=files,
        images_per_step=1,
        data=DataSettings(root=str(folder), image_size=size, random_resized_crop=True, flip=True),
    )
    return Workload(
        title=f"classification: {files} JPEG of 500 x 375 px, {model} gn+ws on one {size} px image per forward",
        config=config,
        files=tuple(sorted((folder / "train").rglob("*.jpg"))),
        decode=read_image,
    )


def detection(folder: Path, *, files: int = 8, model: str = "fasterrcnn_resnet18_fpn", side: int = 256) -> Workload:
    """Pascal VOC's layout, one box in each image."""
    names = [str(index) for index in range(files)]
    for name, picture in zip(names, photos(files, height=375, width=500), strict=True):
        write_jpeg(folder / "JPEGImages" / f"{name}.jpg", picture)
        write(folder / "Annotations" / f"{name}.xml", _VOC.format(name=name, cls=CLASSES[int(name) % 2]))
    for split in ("trainval", "test"):
        write(folder / "ImageSets" / "Main" / f"{split}.txt", "\n".join(names) + "\n")
    config = TrainConfig(
        task="detect",
        model=model,
        normalizer="gn+ws",
        images=files,
        images_per_step=1,
        data=DataSettings(root=str(folder), flip=True),
        detector=DetectorSettings(shorter_side=side, longest_side=2 * side, channels=64),
    )
    return Workload(
        title=f"detection: {files} JPEG of 500 x 375 px, {model} gn+ws at {side} px, one image per forward",
        config=config,
        files=tuple(sorted((folder / "JPEGImages").glob("*.jpg"))),
        decode=read_image,
    )


_VOC = """<annotation><filename>{name}.jpg</filename><size><width>500</width><height>375</height><depth>3</depth></size>
<object><name>{cls}</name><bndbox><xmin>100</xmin><ymin>80</ymin><xmax>300</xmax><ymax>260</ymax></bndbox></object>
</annotation>
"""


def segmentation(
    folder: Path, *, files: int = 8, model: str = "torchvision:lraspp_mobilenet_v3_large", side: int = 240
) -> Workload:
    """Folders of images and label maps: the brightest third of a photo, and the rest."""
    for split in ("train", "test"):
        for index, picture in enumerate(photos(files, height=375, width=500)):
            write_jpeg(folder / split / "images" / f"{index}.jpg", picture)
            bright = picture.mean(2)
            write_map(folder / split / "labels" / f"{index}.png", bright > np.quantile(bright, 2 / 3))
    config = TrainConfig(
        task="segment",
        model=model,
        normalizer="gn+ws",
        images=files,
        images_per_step=1,
        data=DataSettings(root=str(folder), flip=True),
        segment=SegmentSettings(shorter_side=side, scales=(0.75, 1.5), crop=(side, side), class_names=CLASSES),
    )
    return Workload(
        title=f"segmentation: {files} JPEG and maps of 500 x 375 px, {model} gn+ws on one {side} px crop per forward",
        config=config,
        files=tuple(sorted((folder / "train" / "images").glob("*.jpg"))),
        decode=decoded_with_map,
    )


def video(folder: Path, *, files: int = 4, model: str = "tsm:torchvision:resnet18", size: int = 112) -> Workload:
    """Clips of 32 frames, 8 of which are seen."""
    for split in ("train", "test"):
        for index, picture in enumerate(photos(files, height=240, width=352)):
            frames = [picture[:, shift : shift + 320] for shift in range(32)]
            write_clip(folder / split / CLASSES[index % 2] / f"{index}.mp4", frames)
    config = TrainConfig(
        task="video",
        model=model,
        normalizer="gn+ws",
        images=files,
        images_per_step=1,
        data=DataSettings(root=str(folder), image_size=size),
        video=FrameSampling(frames=8),
    )
    return Workload(
        title=f"video: {files} MPEG-4 clips of 32 frames of 320 x 240 px, {model} gn+ws on 8 frames of {size} px per forward",
        config=config,
        files=tuple(sorted((folder / "train").rglob("*.mp4"))),
        decode=decoded_frames,
    )


def photos(count: int, *, height: int, width: int) -> list[Frame]:
    """`count` different parts of two photos."""
    pictures = [picture[24:, :] for picture in load_sample_images().images]
    room_below, room_right = (pictures[0].shape[0] - height, pictures[0].shape[1] - width)
    parts = []
    for index in range(count):
        top, left = (7 * index) % (room_below + 1), (13 * index) % (room_right + 1)
        parts.append(np.ascontiguousarray(pictures[index % 2][top : top + height, left : left + width]))
    return parts


def write(path: Path, text: str) -> None:
    """A file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_jpeg(path: Path, picture: Frame) -> None:
    """A JPEG of quality 90 and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=90)


def write_map(path: Path, labels: NDArray[np.bool_]) -> None:
    """A label map of two classes and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)


def decoded_with_map(path: Path) -> tuple[Tensor, Tensor]:
    """An image of `segmentation` and its label map."""
    return read_image(path), read_label_map(path.parents[1] / "labels" / f"{path.stem}.png")


def write_clip(path: Path, frames: Sequence[Frame]) -> None:
    """An MPEG-4 file of 4 Mbit/s and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def decoded_frames(path: Path) -> list[Frame]:
    """All frames of a clip as pixels."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
