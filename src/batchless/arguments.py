"""The words of the command line, and the YAML files they name, made into the settings of a verb.

Every mistake in them is a ValueError of one line that names the word, what is possible and the nearest match.
"""

import difflib
import re
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import metadata, resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from batchless.advise import ConvertConfig, DoctorConfig, PlanConfig
from batchless.demo import DemoConfig
from batchless.deploy import EvaluateConfig, ExportConfig, PredictConfig
from batchless.federated import FederateConfig
from batchless.tasks import TrainConfig

Format = Literal["table", "html", "markdown", "json"]
_SUFFIXES: dict[str, Format] = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".txt": "table"}
_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
_LISTS = {
    str: "a list such as [gn, gn+ws]",
    int: "a list of whole numbers such as [1, 2]",
    float: "a list of numbers such as [0.5, 0.75]",
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `batchless compare` compares.

    Attributes:
        folders: run folders, or folders that hold them.
        out: file to write; None: it is printed.
        format: table, html, markdown or json; None: by the ending of `out`, a table without one.
        control: what all are compared with, such as bn or bn@64; None: bn at its most images per forward, else the first.
    """

    folders: tuple[str, ...]
    out: str | None = None
    format: Format | None = None
    control: str | None = None

    def __post_init__(self) -> None:
        if self.form() == "html" and self.out is None:
            raise ValueError("format=html is a file: give it a name by --out, such as --out report.html")

    def form(self) -> Format:
        """The format, by the ending of `out` where none is given."""
        if self.format is not None or self.out is None:
            return self.format or "table"
        suffix = Path(self.out).suffix.lower()
        if suffix not in _SUFFIXES:
            raise ValueError(f"out={self.out}: end it in {', '.join(_SUFFIXES)}, or give --format")
        return _SUFFIXES[suffix]


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """Which run `batchless train --resume` or `federate --resume` goes on with; everything else is as the run has it.

    Attributes:
        verb: train or federate.
        resume: its folder.
        device: another device than before; None: the same.
        root: where the data lies now; None: where it lay.
    """

    verb: Literal["train", "federate"]
    resume: str
    device: str | None = None
    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Which federated run `batchless federate --explain` explains instead of running it."""

    run: FederateConfig


Config = (
    TrainConfig
    | FederateConfig
    | ResumeConfig
    | ExplainConfig
    | DemoConfig
    | CompareConfig
    | EvaluateConfig
    | PredictConfig
    | ExportConfig
    | DoctorConfig
    | ConvertConfig
    | PlanConfig
)


@dataclass(frozen=True)
class _Verb:
    """A word after `batchless`: the settings it takes, which of them are given without a flag, and what it does."""

    settings: type[Config]
    positional: tuple[str, ...]
    description: str


_VERBS = {
    "demo": _Verb(DemoConfig, (), "the whole idea in minutes, ends in a report page"),
    "train": _Verb(
        TrainConfig,
        (),
        "train one network, writes a run folder; `train --resume FOLDER` goes on with an interrupted run",
    ),
    "federate": _Verb(
        FederateConfig,
        (),
        "federated learning over domains; `--explain` tells what is shared; `--resume FOLDER` goes on with a run",
    ),
    "compare": _Verb(CompareConfig, ("folders",), "a table from run folders; a page, Markdown or JSON with --out"),
    "evaluate": _Verb(
        EvaluateConfig, ("checkpoint",), "accuracy or AP of a checkpoint, of each class, and what is confused"
    ),
    "predict": _Verb(
        PredictConfig, ("checkpoint", "images"), "the classes of image files, or the objects in them, by a checkpoint"
    ),
    "export": _Verb(
        ExportConfig, ("checkpoint",), "a checkpoint without our layers: ONNX, torch.export or a state dict"
    ),
    "doctor": _Verb(DoctorConfig, ("model",), "what breaks in a model at few images per forward, and what to do"),
    "convert": _Verb(
        ConvertConfig, ("model", "normalizer"), "what a normalizer would replace in a model, layer by layer"
    ),
    "plan": _Verb(PlanConfig, ("model",), "where a training's memory goes, and the largest micro-batch that fits"),
}


def parse_arguments(words: Sequence[str]) -> Config:
    """The settings that the words after `batchless` ask for, as the dataclass of their verb.

    `--help`, `--version` and `--print_config` print and raise SystemExit(0).

    Raises:
        ValueError: an unknown verb, flag, setting or recipe, a value of another type or out of range, a damaged file.
    """
    from jsonargparse import ArgumentParser

    version = metadata.version("batchless")
    description = "Train vision networks where batch statistics fail; compare normalizers."
    parser = ArgumentParser(
        prog="batchless", description=description, version=version, exit_on_error=False, allow_abbrev=False
    )
    verbs = {name: _parser(verb) for name, verb in _VERBS.items()}
    commands = parser.add_subcommands(dest="verb")
    for name, subparser in verbs.items():
        commands.add_subcommand(name, subparser, help=subparser.description)
    if words and words[0] == "demo":  # what the runs of a demo learn is a setting of theirs
        words = [f"--train.task{word.removeprefix('--task')}" if _is_flag(word, "--task") else word for word in words]
    _check_words(words, verbs)
    if words[0] in ("train", "federate") and any(word.partition("=")[0] == "--resume" for word in words):
        return _resume("train" if words[0] == "train" else "federate", words[1:])
    if words[0] == "federate" and "--explain" in words:
        run = parse_arguments([word for word in words if word != "--explain"])
        assert isinstance(run, FederateConfig)
        return ExplainConfig(run=run)
    try:
        parsed = parser.parse_args([_recipe_path(words, index) for index in range(len(words))])
    except ArgumentError as error:
        raise ValueError(_one_line(str(error), verb=words[0], known=_settings(verbs[words[0]]))) from error
    kind: Any = _VERBS[parsed.verb].settings
    _check_given(parsed[parsed.verb], kind)
    given = parser.instantiate(parsed)
    values = {item.name: given[given.verb][item.name] for item in fields(kind)}
    config: Config = kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
    return config


def _is_flag(word: str, flag: str) -> bool:
    return word.partition("=")[0] == flag


def _parser(verb: _Verb) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description=verb.description)
    if verb.settings in (TrainConfig, FederateConfig):
        parser.add_argument("--config", action="config", help="a packaged recipe's name, or a YAML file")
    hints = get_type_hints(verb.settings)
    for name in verb.positional:
        several = {"nargs": "+"} if get_origin(hints[name]) is tuple else {}
        parser.add_argument(name, type=str, help=_documented(verb.settings, name), **several)
    parser.add_class_arguments(verb.settings, as_group=False, skip=set(verb.positional))
    return parser


def _documented(kind: type, name: str) -> str:
    """What the class's docstring says of the attribute, its first line."""
    found = re.search(rf"^\s*{name}: (.*)$", kind.__doc__ or "", re.MULTILINE)
    return found[1].rstrip(".") if found else name


def _resume(verb: Literal["train", "federate"], words: Sequence[str]) -> ResumeConfig:
    """The words after the verb, of which one is `--resume`."""
    values: dict[str, str] = {}
    names = {"--resume": "resume", "--device": "device", "--data.root": "root"}
    rest = iter(words)
    for word in rest:
        flag, _, value = word.partition("=")
        if flag not in names:
            raise ValueError(
                f"--resume goes on with the run's own settings: leave out {flag} (possible are {', '.join(names)})"
            )
        values[names[flag]] = value or next(rest, "")
    if empty := [flag for flag, name in names.items() if values.get(name) == ""]:
        raise ValueError(f"{empty[0]} got no value: write `batchless {verb} --resume FOLDER`")
    return ResumeConfig(verb=verb, **values)


def _settings(parser: Any) -> list[str]:
    """The dotted keys of a verb's settings, groups among them: data.root, data."""
    keys = list(parser.get_defaults().keys())
    groups = {key[:index] for key in keys for index, character in enumerate(key) if character == "."}
    return keys + sorted(groups)


def _check_words(words: Sequence[str], verbs: dict[str, Any]) -> None:
    """Refuse an unknown verb or flag: argparse knows no nearest one, and calls a flag an unrecognized argument."""
    if not words:
        raise ValueError(f"no command given: choose one of {', '.join(verbs)} (batchless --help tells more)")
    verb = words[0]
    if verb in ("-h", "--help", "--version"):
        return
    if verb not in verbs:
        nearest = _nearest(verb, [*verbs, "--help", "--version"])
        raise ValueError(f"unknown command {verb!r}{nearest}: choose one of {', '.join(verbs)}")
    own = {"train": ("resume",), "federate": ("resume", "explain")}.get(verb, ())
    known = [f"--{key}" for key in ("help", "print_config", *own, *_settings(verbs[verb]))]
    for word in words[1:]:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise ValueError(f"unknown flag {flag}{_nearest(flag, known)}: `batchless {verb} --help` lists them")


def _recipe_path(words: Sequence[str], index: int) -> str:
    """The word, or the path of the packaged recipe if it names one after `--config`."""
    word = words[index]
    name = word.removeprefix("--config=")
    if not (word.startswith("--config=") or (index and words[index - 1] == "--config")):
        return word
    recipes = resources.files("batchless") / "recipes"
    known = sorted(recipe.name.removesuffix(".yaml") for recipe in recipes.iterdir() if recipe.name.endswith(".yaml"))
    path = str(recipes / f"{name}.yaml") if name in known and not Path(name).exists() else name
    if not path or not Path(path).exists():
        raise ValueError(
            f"there is no file {name!r} and no recipe of that name{_nearest(name, known)}: the recipes are {', '.join(known)}"
        )
    _check_yaml(path)
    return word.removesuffix(name) + path


def _check_yaml(path: str) -> None:
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise ValueError(f"{place}: not YAML: {getattr(error, 'problem', None) or 'not a text'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines such as `normalizer: gn+ws`, it holds a {type(content).__name__}")


def _check_given(given: Any, kind: Any, prefix: str = "") -> None:
    """Refuse what the parser lets through from YAML: anything for a group of settings, and null for every setting."""
    for name, hint in get_type_hints(kind).items():
        value = given[name]
        if is_dataclass(hint) and hasattr(value, "keys"):
            _check_given(value, hint, f"{prefix}{name}.")
        elif is_dataclass(hint) or (value is None and NoneType not in get_args(hint)):
            raise ValueError(f"{prefix}{name} got {'null' if value is None else value}: expected {_describe(hint)}")


def _one_line(text: str, *, verb: str, known: Iterable[str]) -> str:
    """What the parser has to say, without its types and indentation; as it is where it is of no known kind."""
    if unknown := re.search(r"does not accept option '([^']+)'", text):
        nearest = _nearest(unknown[1], known)
        return f"unknown setting {unknown[1]!r}{nearest}: `batchless {verb} --help` lists them"
    # The last ones: where a file within a file is wrong, the texts are nested.
    keys = re.findall(r'Parser key "([^"]+)"', text)
    values = re.findall(r"(?:(?:Got|Given) value:|Unable to load config) ['\"]?(.*?)['\"]?$", text, re.MULTILINE)
    if keys and values:
        return f"{keys[-1]} got {values[-1]}: expected {_expected(_VERBS[verb].settings, keys[-1])}"
    return " ".join(text.split())


def _expected(kind: Any, key: str) -> str:
    """What the setting with that dotted key may be, in words."""
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
    return _describe(kind)


def _describe(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(_describe(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return _LISTS[get_args(kind)[0]]
    if is_dataclass(kind):
        return f"some of its settings ({', '.join(item.name for item in fields(kind))}), or a YAML file of them"
    return _TYPES[kind]


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
