"""Pascal VOC's layout: one XML file for each image, and lists of the images of each split."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from batchless.data.folders import read_image
from batchless.data.objects import AnnotatedImage, DetectionImages, ObjectCollector

_LARGEST_XML = 2**20  # bytes; VOC's have a few thousand
_LISTS = Path("ImageSets") / "Main"


def find_voc(root: Path) -> Path | None:
    """The folder with `Annotations/`, `JPEGImages/` and `ImageSets/Main/`: `root` itself, or one or two below it."""
    candidates = [root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
    parts = ("Annotations", "JPEGImages", _LISTS)
    return next((folder for folder in candidates if all((folder / part).is_dir() for part in parts)), None)


def open_voc(folder: Path, split: Literal["train", "test"]) -> DetectionImages:
    """The images of a split: `ImageSets/Main/trainval.txt` and `test.txt`; without a test list, `train.txt` and `val.txt`.

    The classes are the names in the training images' annotations, sorted. Coordinates count pixels from 1 and name the last
    pixel of the object, as VOC defines them. Objects marked `difficult` are neither learned nor evaluated (as COCO's crowds).

    Raises:
        ValueError: naming the file: missing, too large, no XML, or without what an annotation needs.
    """
    has_test = (folder / _LISTS / "test.txt").exists()
    lists = {"train": "trainval", "test": "test"} if has_test else {"train": "train", "test": "val"}
    training = _annotations(folder, lists["train"])
    classes = tuple(sorted({_text(item, "name", file) for file, root in training for item in root.iter("object")}))
    if not classes:
        raise ValueError(f"{folder / 'Annotations'}: none of the training images has an object")
    chosen = training if split == "train" else _annotations(folder, lists["test"])
    found: Counter[str] = Counter()
    images = tuple(_image(root, file, folder, classes, found) for file, root in chosen)
    return DetectionImages(images=images, classes=classes, found=found)


def read_xml(path: Path) -> Element:
    """The root of an XML file of at most a megabyte without a document type, so that no entity can grow or reach outside.

    Raises:
        ValueError: naming the file.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_document_type
    try:
        size = path.stat().st_size
        if size > _LARGEST_XML:
            raise ValueError(f"{size} bytes, where an annotation has at most {_LARGEST_XML}")
        parser.Parse(path.read_bytes(), True)
        root = builder.close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (expat.ExpatError, ValueError) as error:
        raise ValueError(f"{path}: no annotation ({error}); replace or correct this file") from error
    assert isinstance(root, Element)
    return root


def _refuse_document_type(*names: object) -> None:
    raise ValueError("it declares a document type, which annotations have not")


def _annotations(folder: Path, name: str) -> list[tuple[Path, Element]]:
    listing = folder / _LISTS / f"{name}.txt"
    try:
        # In the lists of single classes a second column says whether the image shows it.
        stems = [line.split()[0] for line in listing.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{listing}: the list of images cannot be read ({error})") from error
    if not stems:
        raise ValueError(f"{listing}: the list names no image")
    files = [folder / "Annotations" / f"{stem}.xml" for stem in stems]
    return [(file, read_xml(file)) for file in files]


def _image(root: Element, file: Path, folder: Path, classes: Sequence[str], found: Counter[str]) -> AnnotatedImage:
    name = root.findtext("filename", "").strip()
    pictures = folder / "JPEGImages"
    # The list's name decides; tools leave all kinds of things in <filename>.
    path = next(
        (p for p in (pictures / f"{file.stem}.jpg", pictures / Path(name).name) if p.is_file()), pictures / file.stem
    )
    if not path.is_file():
        raise ValueError(f"{pictures / file.stem}.jpg: the image of {file} is not there")
    height, width = _number(root, "size/height", file), _number(root, "size/width", file)
    collector = ObjectCollector(height=int(height), width=int(width), classes=classes, found=found)
    for item in root.iter("object"):
        left, top, right, bottom = (_number(item, f"bndbox/{side}", file) for side in ("xmin", "ymin", "xmax", "ymax"))
        difficult = item.findtext("difficult", "0").strip() == "1"
        collector.add(_text(item, "name", file), (left - 1, top - 1, right, bottom), crowd=difficult)
    return collector.image(str(path), partial(read_image, str(path)), masks=False)


def _text(element: Element, path: str, file: Path) -> str:
    text = element.findtext(path, "").strip()
    if not text:
        raise ValueError(f"{file}: an <{element.tag}> has no <{path.replace('/', '><')}>; correct this file")
    return text


def _number(element: Element, path: str, file: Path) -> float:
    text = _text(element, path, file)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{file}: <{path.replace('/', '><')}> is {text!r}, no number; correct this file") from None
