import re
import shlex
from importlib import resources

import pytest
import torch
import yaml

from batchless.arguments import parse_arguments
from batchless.federated import FederateConfig
from batchless.federated.partitioners import IID
from batchless.models import build_model
from batchless.nn import parse_normalizer
from batchless.tasks import TrainConfig
from batchless.tasks.trained import build_plain

ALL = sorted(path for path in (resources.files("batchless") / "recipes").iterdir() if path.name.endswith(".yaml"))
FEDERATED = [path for path in ALL if "kind: federate" in path.read_text(encoding="utf-8").splitlines()]
RECIPES = [path for path in ALL if path not in FEDERATED]
federated = pytest.mark.parametrize("recipe", FEDERATED, ids=lambda path: path.name)
DETECTION = [path for path in RECIPES if "task: detect" in path.read_text(encoding="utf-8").splitlines()]
SEGMENTATION = [path for path in RECIPES if "task: segment" in path.read_text(encoding="utf-8").splitlines()]
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
classification = pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path not in DETECTION + SEGMENTATION], ids=lambda path: path.name
)
FACTS = ["paper", "command", "cost", "result"]
CLASSES = {"imagenet": 1000, "cifar100": 100, "cifar10": 10, "fashion": 10, "embedded": 10, "something": 174}
EPOCH = {
    "imagenet": 1_281_167,
    "cifar100": 50_000,
    "cifar10": 50_000,
    "fashion": 60_000,
    "embedded": 717,
    "something": 86_017,
}


def name_of(recipe) -> str:
    return recipe.name.removesuffix(".yaml")


def parsed(recipe, *words: str) -> TrainConfig:
    config = parse_arguments(["train", "--config", name_of(recipe), *words])
    assert isinstance(config, TrainConfig)
    return config


def dataset(recipe) -> str:
    return name_of(recipe).partition("_")[0]


def header(text: str) -> list[str]:
    """The comment lines before the first setting."""
    lines = text.splitlines()
    length = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:length]]


def facts(text: str) -> dict[str, str]:
    """What the header says of `paper`, `command`, `cost` and `result`, and of `differs`."""
    found = (re.fullmatch(r"(paper|command|cost|result|differs): +(.+)", line) for line in header(text))
    return {match[1]: match[2] for match in found if match}


def assert_every_setting_arrived(config: object, text: str) -> None:
    """`config` has every value that the recipe's `text` gives, in its groups too."""
    for name, value in yaml.safe_load(text).items():
        for part, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            found = getattr(config, name) if part is None else getattr(getattr(config, name), part)
            assert found == (tuple(inner) if isinstance(inner, list) else inner)


def test_there_are_the_recipes_people_ask_for():
    assert {name_of(recipe) for recipe in RECIPES} >= {
        "imagenet_resnet50",
        "imagenet_resnet101",
        "imagenet_resnext50",
        "imagenet_resnext101",
        "cifar10_resnet20",
        "cifar10_resnet110",
        "cifar100_resnet20",
        "cifar100_resnet110",
        "fashion_mnist_resnet20",
        "embedded_quick",
    }


@recipes
def test_it_begins_with_what_it_is_for_its_paper_command_cost_and_result(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert header(text)[0]
    said = facts(text)
    assert list(said) == (FACTS if said["paper"].startswith("none") else [*FACTS, "differs"])


@recipes
def test_its_lines_fit_a_terminal(recipe):
    assert max(map(len, recipe.read_text(encoding="utf-8").splitlines())) <= 128


@recipes
def test_it_is_a_whole_configuration(recipe):
    config = parsed(recipe)
    assert_every_setting_arrived(config, recipe.read_text(encoding="utf-8"))
    assert config.normalizer == str(parse_normalizer(config.normalizer))


@recipes
def test_its_command_is_one_that_runs_it(recipe):
    program, *words = shlex.split(facts(recipe.read_text(encoding="utf-8"))["command"])
    assert program == "batchless"
    assert words[words.index("--config") + 1] == name_of(recipe)
    config = parse_arguments(words)
    assert isinstance(config, TrainConfig)
    given = {name: words[index + 1] for index, name in enumerate(words) if name in ("--data.root", "--normalizer")}
    assert given.get("--data.root") == config.data.root == parsed(recipe).data.root


@classification
def test_its_model_can_be_built(recipe):
    with torch.device("meta"):
        model = build_plain(parsed(recipe), num_classes=CLASSES[dataset(recipe)])
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    [outputs] = [module.out_features for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert outputs == CLASSES[dataset(recipe)]


@pytest.mark.parametrize("recipe", DETECTION, ids=lambda path: path.name)
def test_a_detector_can_be_built(recipe):
    config = parsed(recipe)
    assert build_plain(config, num_classes=3) is not None


@pytest.mark.parametrize("recipe", SEGMENTATION, ids=lambda path: path.name)
def test_a_segmenter_can_be_built(recipe):
    config = parsed(recipe)
    classes = len(config.segment.class_names) or {"voc": 21, "cityscapes": 19, "embedded": 6}[dataset(recipe)]
    with torch.device("meta"):
        model = build_plain(config, num_classes=classes)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    epochs = re.search(r"^# cost: +(\d+) epochs, ([\d,]+) images", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    images = {"voc": 10_582, "cityscapes": 2_975, "camvid": 367, "embedded": 800}[dataset(recipe)]
    assert config.images == int(epochs[2].replace(",", "")) == int(epochs[1]) * images


def test_voc_is_trained_as_its_authors_do():
    config = parsed(next(recipe for recipe in RECIPES if name_of(recipe) == "voc_deeplabv3_resnet101"))
    assert (config.images_per_step, config.optimizer.learning_rate, config.optimizer.weight_decay) == (16, 0.007, 1e-4)
    for share in (0.0, 0.3, 0.9):
        rate = config.optimizer.learning_rate_at(share, images_per_step=16)
        assert rate == pytest.approx(0.007 * (1 - share) ** 0.9)
    assert (config.segment.crop, config.segment.scales, config.segment.ignore) == ((513, 513), (0.5, 2.0), (255,))
    assert (config.segment.output_stride, config.segment.multi_grid) == (16, (1, 1, 1))


# Images per step, rate, steps, and those after which the rate falls to a tenth.
MASK_RCNN = {
    "coco_maskrcnn_resnet50": (8, 0.01, 360_000, (300_000, 340_000)),
    "coco_maskrcnn_resnet101": (4, 0.005, 720_000, (600_000, 680_000)),
    "coco_maskrcnn_resnext101_32x4d": (4, 0.005, 720_000, (600_000, 680_000)),
}


@pytest.mark.parametrize("name", MASK_RCNN)
def test_coco_is_trained_as_its_authors_do(name):
    [recipe] = [recipe for recipe in RECIPES if name_of(recipe) == name]
    config, (size, rate, steps, falls) = parsed(recipe), MASK_RCNN[name]
    assert (config.images_per_step, config.images) == (size, size * steps)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 1e-4)
    for step in (600, 290_000, 310_000, 345_000, 590_000, 610_000, 690_000):
        if step < steps:
            found = config.optimizer.learning_rate_at(step / steps, images_per_step=size)
            assert found == pytest.approx(rate * 0.1 ** sum(step > fall for fall in falls))


@classification
def test_the_epochs_it_speaks_of_are_those_it_trains(recipe):
    text = recipe.read_text(encoding="utf-8")
    config = parsed(recipe)
    stated = re.search(r"^images: (\d+)  # (\d+) epochs$", text, re.MULTILINE)
    if stated is None:
        assert dataset(recipe) == "embedded"
        return
    assert int(stated[1]) == config.images == int(stated[2]) * EPOCH[dataset(recipe)]
    assert config.evaluations == int(stated[2])
    counted = "clips" if config.task == "video" else "images"
    assert f"{stated[2]} epochs, {config.images:,} {counted}" in facts(text)["cost"]


@federated
def test_a_federated_one_is_a_whole_configuration_too(recipe):
    text = recipe.read_text(encoding="utf-8")
    said = facts(text)
    assert list(said) == (FACTS if said["paper"].startswith("none") else [*FACTS, "differs"])
    assert max(map(len, text.splitlines())) <= 128
    program, *words = shlex.split(said["command"])
    assert program == "batchless"
    assert words[:3] == ["federate", "--config", name_of(recipe)]
    config = parse_arguments(words)
    assert isinstance(config, FederateConfig)
    config = parse_arguments(words[:3])
    assert isinstance(config, FederateConfig)
    assert_every_setting_arrived(config, text)
    with torch.device("meta"):
        assert build_model(config.model, num_classes=10) is not None


# Clients of each domain, images to train and to validate with, pixels, rounds, share of the clients, epochs in a round.
PUBLISHED_SIZES = {
    "digits_five_fedwon": (1, 743, 0, 28, 100, 1.0, 1),
    "digits_five_cross_device_fedwon": (20, None, 0, 28, 100, 0.1, 1),
    "office_caltech_fedwon": (1, 62, 50, 256, 300, 1.0, 1),
    "domainnet_fedwon": (1, 105, 105, 256, 300, 1.0, 1),
    "cifar10_label_skew_fedwon": (100, None, None, 32, 300, 0.1, 5),
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_fedbns_and_fedwons_sizes_are_recipes(name):
    config = parse_arguments(["federate", "--config", name])
    assert isinstance(config, FederateConfig)
    data = config.data
    sizes = (config.clients_per_domain, data.images_per_client, data.validation_images, data.image_size)
    assert (*sizes, config.rounds, config.fraction, config.local_epochs) == PUBLISHED_SIZES[name]
    assert config.client_settings(device="cpu").optimizer.adaptive_clipping == 0.1  # as the paper has it at 32 images


def test_label_skew_has_its_iid_counterpart():
    words = "federate --config cifar10_label_skew_fedwon --data.partitioner iid --data.alpha null".split()
    config = parse_arguments(words)
    assert isinstance(config, FederateConfig)
    assert config.data.rule() == IID()


# Epochs, and those after which the rate falls to a tenth.
SCHEDULES = {
    "imagenet_resnet50": (90, (30, 60)),
    "imagenet_resnet101": (100, (30, 60, 90)),
    "imagenet_resnext50": (100, (30, 60, 90)),
    "imagenet_resnext101": (100, (30, 60, 90)),
    "cifar10_resnet110": (164, (81, 122)),
    "cifar100_resnet110": (164, (81, 122)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_falls_after_the_epochs_of_the_authors(name):
    [recipe] = [recipe for recipe in RECIPES if name_of(recipe) == name]
    config, (epochs, steps) = parsed(recipe), SCHEDULES[name]
    warmup = config.optimizer.warmup * epochs
    for quarter in range(4 * epochs):
        epoch = (quarter + 0.5) / 4
        rate = config.optimizer.learning_rate_at(epoch / epochs, images_per_step=config.images_per_step)
        expected = 0.1 * 0.1 ** sum(epoch > step for step in steps) * min(epoch / warmup if warmup else 1, 1)
        assert rate == pytest.approx(expected)


def test_imagenet_is_trained_as_its_authors_do():
    for recipe in (recipe for recipe in RECIPES if dataset(recipe) == "imagenet"):
        config = parsed(recipe)
        assert config.images_per_step == (256 if name_of(recipe) == "imagenet_resnet50" else 128)
        assert (config.data.image_size, config.data.resize_shorter_side) == (224, 256)
        assert config.data.random_resized_crop
        assert config.data.flip
        assert (config.data.color_jitter, config.data.rand_augment, config.data.mixup) == (0, 0, 0)
        assert config.label_smoothing == 0
        assert (config.optimizer.momentum, config.optimizer.nesterov, config.optimizer.warmup) == (0.9, False, 0)
        assert (config.optimizer.weight_decay, config.optimizer.decay_one_dimensional) == (1e-4, True)


def test_every_data_set_has_a_folder():
    """A recipe for a data set must not fall back to the embedded images."""
    for recipe in RECIPES:
        root = parsed(recipe).data.root
        assert (root is None) == (dataset(recipe) == "embedded")
        assert root is None or root.startswith("~/")
