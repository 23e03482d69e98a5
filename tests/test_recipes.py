import re
import shlex
from importlib import resources

import pytest
import yaml

from batchless.arguments import parse_arguments
from batchless.nn import parse_normalizer
from batchless.tasks import TrainConfig

RECIPES = sorted(path for path in (resources.files("batchless") / "recipes").iterdir() if path.name.endswith(".yaml"))
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)


def header(text: str) -> list[str]:
    """The comment lines before the first setting."""
    lines = text.splitlines()
    length = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:length]]


def facts(text: str) -> dict[str, str]:
    """What the header says of `paper`, `command`, `cost` and `result`."""
    found = (re.fullmatch(r"(paper|command|cost|result): +(.+)", line) for line in header(text))
    return {match[1]: match[2] for match in found if match}


def test_there_are_recipes():
    assert {path.name for path in RECIPES} >= {"embedded_quick.yaml", "cifar10_resnet20.yaml"}


@recipes
def test_it_begins_with_what_it_is_for_its_paper_command_cost_and_result(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert header(text)[0]
    assert list(facts(text)) == ["paper", "command", "cost", "result"]


@recipes
def test_it_is_a_whole_configuration(recipe):
    config = parse_arguments(["train", "--config", recipe.name.removesuffix(".yaml")])
    assert isinstance(config, TrainConfig)
    for name, value in yaml.safe_load(recipe.read_text(encoding="utf-8")).items():
        if not isinstance(value, dict):
            assert getattr(config, name) == value
            continue
        for part, inner in value.items():
            assert getattr(getattr(config, name), part) == inner
    assert config.normalizer == str(parse_normalizer(config.normalizer))


@recipes
def test_its_command_is_one_that_runs_it(recipe):
    program, *words = shlex.split(facts(recipe.read_text(encoding="utf-8"))["command"])
    assert program == "batchless"
    assert words[words.index("--config") + 1] == recipe.name.removesuffix(".yaml")
    assert isinstance(parse_arguments(words), TrainConfig)
