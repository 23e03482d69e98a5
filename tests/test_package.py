import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import batchless

SOURCES = sorted(Path(batchless.__file__).parent.rglob("*.py"))

PUBLIC = ["AGC", "ClipNorm", "accumulate", "batched", "convert", "fold", "lean", "recalibrate", "standardized"]
LAYERS = [
    *(
        f"{kind}{layer}{dimensions}d"
        for kind in ("WS", "ScaledWS")
        for layer in ("Conv", "ConvTranspose")
        for dimensions in "123"
    ),
    *(f"{kind}Conv{dimensions}d" for kind in ("WN", "CWN") for dimensions in "123"),
    *("WSLinear", "ScaledWSLinear", "BatchChannelNorm", "EstimatedBatchNorm"),
]
ROOMS = {
    "batchless": PUBLIC,
    "batchless.nn": ["standardize_weight", "Normalizer", "parse_normalizer", "standardized", *LAYERS],
    "batchless.train": [
        "AGC",
        "ClipNorm",
        "LoopSettings",
        "OptimizerSettings",
        "Task",
        "accumulate",
        "evaluate",
        "train",
    ],
    "batchless.tasks": ["Classify", "DataSettings", "TrainConfig", "run_training"],
    "batchless.models": ["CifarResNet", "build_model"],
    "batchless.runs": ["RunFolder", "find_runs", "load_checkpoint", "load_model_state", "read_run"],
    "batchless.data": ["Augment", "ImageDataset", "batches", "epoch_order", "open_images"],
    "batchless.surgery": ["ConversionReport", "convert", "fold", "recalibrate"],
    "batchless.report": ["claims", "comparison", "write_page"],
}


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, names in ROOMS.items() for name in names])
def test_a_public_name_is_there_and_documented(room, name):
    thing = getattr(importlib.import_module(room), name)
    own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__  # not one inherited from torch
    assert own
    assert thing.__module__.startswith("batchless.")


def test_the_package_offers_nothing_but_its_public_names():
    package = Path(batchless.__file__).parent
    imported = {path.stem for path in package.iterdir()}  # rooms that other tests have imported
    assert {name for name in vars(batchless) if not name.startswith("_")} - imported == set(PUBLIC)


_SIDE_EFFECTS = """
import json, sys, warnings
import torch, torchvision
torch.manual_seed(5)
torch.set_num_threads(3)

def state():
    return [torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype() == torch.float32,
            torch.is_grad_enabled(), list(map(str, warnings.filters))]

before = state()
import batchless
print(json.dumps({"changed": [i for i, (a, b) in enumerate(zip(before, state())) if a != b], "modules": list(sys.modules)}))
"""


def test_importing_has_no_side_effects_and_leaves_heavy_libraries_alone():
    done = subprocess.run(
        [sys.executable, "-c", _SIDE_EFFECTS], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["changed"] == []
    unwanted = {"timm", "sklearn", "scipy", "jsonargparse", "plotly", "jinja2", "rich", "segmentation_models_pytorch"}
    assert unwanted & {name.partition(".")[0] for name in found["modules"]} == set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_files_and_functions_are_short(source):
    text = source.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        # The docstring does not count: it is as long as what there is to say.
        first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
        assert function.end_lineno - first.lineno < 60, function.name


@pytest.mark.parametrize("source", [path for path in SOURCES if path.name == "__init__.py"], ids=str)
def test_a_room_exports_by_name_and_does_nothing_else(source):
    docstring, *rest = ast.parse(source.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    for statement in rest:
        assert isinstance(statement, ast.ImportFrom)
        assert statement.module.startswith("batchless.")
        assert all(alias.name == alias.asname for alias in statement.names)
