"""Clips that a file lists: `path label` in each line, and Something-Something V1 and V2 as they are distributed."""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "test"]
Listed = tuple[list[tuple[str, int]], tuple[str, ...]]
"""(path, label) of each clip, and the names of the classes."""

_LISTS = {"train": ("train.csv", "train.txt"), "test": ("test.csv", "val.csv", "test.txt", "val.txt")}
_SPLITS = {"train": "train", "test": "validation"}  # the test clips of Something-Something have no labels


@dataclass(frozen=True)
class Something:
    """Where the files of Something-Something are.

    Attributes:
        version: 1 or 2.
        lists: the annotation file of each split.
        labels: the file of the classes.
        clips: the folder of the clips.
    """

    version: Literal[1, 2]
    lists: dict[Split, Path]
    labels: Path
    clips: Path


def find_something(root: Path) -> Something | None:
    """Something-Something V1 or V2 in `root`, its annotations there or in `labels/`; None if it is not there.

    ValueError if there are annotations but no folder of clips.
    """
    versions: tuple[tuple[Literal[1, 2], str], ...] = ((1, "csv"), (2, "json"))
    for version, extension in versions:
        name = f"something-something-v{version}"
        for folder in (root, root / "labels"):
            for prefix in (f"{name}-", "") if version == 2 else (f"{name}-",):
                lists: dict[Split, Path] = {
                    "train": folder / f"{prefix}train.{extension}",
                    "test": folder / f"{prefix}validation.{extension}",
                }
                labels = folder / f"{prefix}labels.{extension}"
                if labels.is_file() and lists["train"].is_file():
                    return Something(version, lists, labels, _clips_folder(root, name))
    return None


def _clips_folder(root: Path, name: str) -> Path:
    names = (f"20bn-{name}", f"20bn-{name}-frames", "videos", "frames")
    for folder in names:
        if (root / folder).is_dir():
            return root / folder
    raise ValueError(f"{root}: annotations of {name}, but no folder of clips; looked for {', '.join(names)}")


def open_something(found: Something, split: Split) -> Listed:
    """The clips of `train`, or of `validation` for `test`; clips are `<id>.webm`, `<id>.mp4` or folders of frames `<id>/`."""
    if found.version == 1:
        classes = tuple(sorted(_lines(found.labels)))
        rows = [_fields(row, number, found.lists[split]) for number, row in enumerate(_rows(found.lists[split]), 1)]
    else:
        classes = _classes_of_json(found.labels)
        rows = [
            _entry(item, number, found.lists[split]) for number, item in enumerate(_json(found.lists[split], list), 1)
        ]
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    for number, (clip, name) in enumerate(rows, 1):
        if name not in labels:
            raise ValueError(
                f"{found.lists[split]}, entry {number}: {name!r} is not one of the classes in {found.labels}"
            )
        files.append((_clip_path(found.clips, clip), labels[name]))
    return _checked(files, found.lists[split]), classes


def _clip_path(folder: Path, clip: str) -> str:
    """Frames where there is a folder of them; looking for 200,000 files would take a minute, so else by the folder's name."""
    if re.fullmatch(r"\w+", clip) is None:
        raise ValueError(f"{folder}: {clip!r} is no name of a clip")
    videos = folder.name.endswith("v2") or folder.name == "videos"
    return str(folder / (f"{clip}.webm" if videos else clip))


def _entry(item: Any, number: int, path: Path) -> tuple[str, str]:
    try:
        return str(item["id"]), str(item["template"]).replace("[", "").replace("]", "")
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}, entry {number}: no id and template in it") from error


def _fields(row: list[str], number: int, path: Path) -> tuple[str, str]:
    if len(row) != 2:
        raise ValueError(f"{path}, line {number}: {';'.join(row)!r} is not `id;label`")
    return row[0], row[1]


def _classes_of_json(path: Path) -> tuple[str, ...]:
    labels = _json(path, dict)
    try:
        order = {int(label): str(name) for name, label in labels.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: it must map each class to its number") from error
    if sorted(order) != list(range(len(labels))):
        raise ValueError(f"{path}: the numbers of the {len(labels)} classes are not 0 to {len(labels) - 1}")
    return tuple(order[label] for label in range(len(order)))


def holds_lists(root: Path) -> bool:
    """Whether there is a list of clips for training and one for test."""
    return all(any((root / name).is_file() for name in names) for names in _LISTS.values())


def open_lists(root: Path, split: Split) -> Listed:
    """The clips of `train.csv`, or of `test.csv`, else `val.csv` (or `.txt`): in each line a path, a space or comma, a label.

    Paths are relative to `root`, or absolute. Labels are numbers from 0 on, named by the lines of `classes.txt` where there is
    one; or names, which are sorted. ValueError naming file and line for one that is neither, or that training has not.
    """
    rows = {name: _labelled(_list_file(root, name)) for name in ("train", "test")}
    names = [label for _, label in rows["train"]]
    if all(name.isdecimal() for name in names):
        count = max(map(int, names)) + 1
        classes = _lines(root / "classes.txt") if (root / "classes.txt").is_file() else [str(n) for n in range(count)]
        labels = {str(label): label for label in range(len(classes))}
    else:
        classes = sorted(set(names))
        labels = {name: label for label, name in enumerate(classes)}
    path = _list_file(root, split)
    files = []
    for number, (clip, name) in enumerate(rows[split], 1):
        key = str(int(name)) if name.isdecimal() and name not in labels else name
        if key not in labels:
            raise ValueError(f"{path}, clip {number} ({clip}): label {name!r} is none of the {len(classes)} classes")
        files.append((str(root / clip), labels[key]))
    return _checked(files, path), tuple(classes)


def _list_file(root: Path, split: str) -> Path:
    return next(root / name for name in _LISTS[split] if (root / name).is_file())


def _labelled(path: Path) -> list[tuple[str, str]]:
    """Path and label of each line; the label is what follows the last comma, tab or space."""
    found = []
    for number, line in enumerate(_lines(path), 1):
        match = re.fullmatch(r"(.+)[,\s](\S+)", line)
        if match is None:
            raise ValueError(f"{path}, line {number}: {line!r} is not a path, a space or comma, and a label")
        found.append((match[1].rstrip(", \t").strip('"'), match[2].strip('"')))
    if not found:
        raise ValueError(f"{path}: no clip in it")
    return found


def _checked(files: list[tuple[str, int]], path: Path) -> list[tuple[str, int]]:
    if not files:
        raise ValueError(f"{path}: no clip in it")
    return files


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _rows(path: Path) -> Iterable[list[str]]:
    return (row for row in csv.reader(_text(path).splitlines(), delimiter=";") if row)


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); replace it by an undamaged copy") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: a {kind.__name__} is expected in it, got a {type(content).__name__}")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
