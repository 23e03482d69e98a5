"""DomainNet's own split: `<domain>_train.txt` and `<domain>_test.txt`, each line a path and a label."""

from pathlib import Path
from typing import Literal

from batchless.data.domain_split import DomainImages
from batchless.data.folders import FolderImages

_SUFFIX = {"train": "_train.txt", "test": "_test.txt"}


def find_lists(root: Path) -> tuple[str, ...]:
    """The names of the domains with a training or a test list in `root` or in `root/splits`, sorted."""
    return tuple(
        sorted({path.name.removesuffix(end) for end in _SUFFIX.values() for path in _folder(root).glob(f"?*{end}")})
    )


def open_list(root: Path, domain: str, split: Literal["train", "test"]) -> DomainImages:
    """The images in a domain's list, in its order; lines are `<domain>/<class>/<file> <label>`, relative to `root`.

    A class is called by its folder; both lists of a domain are read for the names. ValueError naming file and line for
    a line of another form, a label with two names, a class without images, or an image that is missing.
    """
    rows = {name: _read(_folder(root) / (domain + end)) for name, end in _SUFFIX.items()}
    names: dict[int, str] = {}
    for name, end in _SUFFIX.items():
        for number, (path, label) in enumerate(rows[name], start=1):
            where = f"{_folder(root) / (domain + end)} line {number}"
            folder = Path(path).parent.name
            if names.setdefault(label, folder) != folder:
                raise ValueError(
                    f"{where}: label {label} is {names[label]!r} before and {folder!r} here; correct the label"
                )
    if sorted(names) != list(range(len(names))):
        absent = min(set(range(len(names))) - set(names))
        raise ValueError(
            f"{_folder(root) / (domain + _SUFFIX['train'])}: no image has label {absent}, but there are labels up to"
            f" {max(names)}; labels must run from 0 without gaps"
        )
    if len(set(names.values())) != len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(
            f"{_folder(root) / (domain + _SUFFIX['train'])}: class {twice!r} has several labels; give it one"
        )
    files = tuple((str(root / path), label) for path, label in rows[split])
    check_present([path for path, _ in files], listed_in=_folder(root) / (domain + _SUFFIX[split]))
    images = FolderImages(files=files, classes=tuple(names[label] for label in range(len(names))))
    return DomainImages(images=images, is_split=True)


def check_present(paths: list[str], *, listed_in: Path) -> None:
    """ValueError naming the first of these files that does not exist; each folder is listed once."""
    listings: dict[Path, set[str]] = {}
    for path in map(Path, paths):
        if path.parent not in listings:
            listings[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in listings[path.parent]:
            raise ValueError(f"{path}: no such file, but {listed_in} lists it; unpack the images beside the list")


def _folder(root: Path) -> Path:
    """Where the lists are."""
    return root / "splits" if any((root / "splits").glob("?*_t*.txt")) else root


def _read(path: Path) -> list[tuple[str, int]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; every domain needs {' and '.join(_SUFFIX.values())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error}); replace it by an undamaged copy") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        image, _, label = line.strip().rpartition(" ")
        if not image or not label.isdecimal() or Path(image).is_absolute() or ".." in Path(image).parts:
            raise ValueError(f"{path} line {number}: {line[:80]!r}, expected `<domain>/<class>/<file> <label>`")
        rows.append((image, int(label)))
    if not rows:
        raise ValueError(f"{path}: lists no image; replace it by an undamaged copy")
    return rows
