"""Run folders as `batchless train` leaves them, without any training."""

import json
import math
import random
import struct
import zlib
from pathlib import Path

from batchless.runs import Run, RunFolder, read_run

NORMALIZERS = {"bn": (0.08, 0.5), "gn+ws": (0.02, 0.61), "bcn-micro(groups=4)+ws": (0.0, 0.65)}


def png(*, shade: int = 128, side: int = 32) -> bytes:
    """A small picture: a diagonal bar on a plain ground."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = [b"\0" + bytes(shade if abs(x - y) > 4 else 255 - shade for x in range(side)) for y in range(side)]
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )


def conversion(normalizer: str) -> dict[str, object]:
    return {
        "normalizer": normalizer,
        "found_by": "example",
        "notes": ["statistics start fresh in 2 layers: train, or recalibrate"],
        "entries": [
            {"name": "conv1", "action": "replaced", "was": "Conv2d", "now": "WSConv2d", "detail": "gamma 1.0000"},
            {"name": "bn1", "action": "replaced", "was": "BatchNorm2d", "now": "GroupNorm", "detail": "4 groups of 4"},
            {"name": "bn2", "action": "replaced", "was": "BatchNorm2d", "now": "GroupNorm", "detail": "4 groups of 4"},
            {"name": "fc", "action": "kept", "was": "Linear", "now": "Linear", "detail": ""},
        ],
    }


def prediction(kind: str = "worst", **more: object) -> dict[str, object]:
    return {
        "kind": kind,
        "picture": "0.png",
        "truth": "seven",
        "predicted": "one" if kind == "worst" else "seven",
        "confidence": 0.93,
        "source": "test/7/0012.png",
        **more,
    }


def write_pictures(folder: Path, predictions: object, *, files: dict[str, bytes] | None = None) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    for name, content in (files or {"0.png": png()}).items():
        (folder / "pictures" / name).write_bytes(content)
    (folder / "pictures" / "predictions.json").write_text(json.dumps(predictions))


def write_run(
    folder: Path,
    normalizer: str = "gn+ws",
    images_per_forward: int = 2,
    *,
    seed: int = 0,
    accuracy: float = 0.6,
    failed: str | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """A whole run folder, or that of a run that failed after its second test."""
    random_numbers = random.Random(f"{normalizer} {images_per_forward} {seed}")
    settings = {
        "model": "cifar_resnet8",
        "normalizer": normalizer,
        "images_per_forward": images_per_forward,
        "images_per_step": 64,
        "seed": seed,
        "out": str(folder),
        "optimizer": {"name": "sgd", "lr": 0.1},
        **(config or {}),
    }
    with RunFolder.create(folder, config=settings, seed=seed) as run:
        for step in range(1, 3 if failed else 13):
            share = 1 - math.exp(-step / 3)
            noise = 0.008 * random_numbers.gauss(0, 1) if step < 12 else 0.0
            run.log({"kind": "train", "images": 1000 * step, "loss": 2.3 * (1 - 0.7 * share)})
            run.log(
                {"kind": "test", "images": 1000 * step, "accuracy": 0.1 + (accuracy - 0.1) * share + noise, "loss": 1.0}
            )
        figures = {
            "test_accuracy": accuracy,
            "test_loss": 1.0,
            "images": 12000,
            "seconds": 30.5,
            "images_per_second": 150.0 * images_per_forward**0.5,
            "peak_memory_bytes": 2**28 + 2**24 * images_per_forward,
            "waiting_share": 0.5 / images_per_forward,
        }
        run.finish({"failed": failed} if failed else figures)
    if failed:
        return folder
    (folder / "conversion.json").write_text(json.dumps(conversion(normalizer)))
    kinds = ["worst", "typical"] * 4
    predictions = [prediction(kind, picture=f"{index}.png") for index, kind in enumerate(kinds)]
    files = {f"{index}.png": png(shade=60 + 20 * index) for index in range(len(kinds))}
    write_pictures(folder, predictions, files=files)
    return folder


def write_study(root: Path, *, seeds: int = 3) -> list[Run]:
    """Three normalizers at 1, 2, 8 and 64 images per forward, with what goes wrong in life: bn fails at 1."""
    runs = []
    for normalizer, (loss, best) in NORMALIZERS.items():
        for size in (1, 2, 8, 64):
            for seed in range(seeds):
                noise = 0.01 * random.Random(f"{normalizer}{size}{seed}").gauss(0, 1)
                fails = (normalizer, size) == ("bn", 1)
                folder = write_run(
                    root / f"{normalizer}-{size}-{seed}",
                    normalizer,
                    size,
                    seed=seed,
                    accuracy=round(best + 0.02 * math.log2(size) - loss / size + noise, 4),
                    failed="Expected more than 1 value per channel when training" if fails else None,
                )
                runs.append(read_run(folder))
    return runs
