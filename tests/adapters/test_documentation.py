"""Every snippet of docs/adapters.md runs as it stands, and every example script trains."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text()
SECTIONS = re.findall(r"^## ([^\n]*)\n.*?```python\n(.*?)```", PAGE, flags=re.S | re.M)
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
NEEDS = {
    **{"Lightning": "lightning", "Accelerate": "accelerate", "Hugging Face's Trainer": "transformers"},
    **{"lightning_module": "lightning", "accelerate_loop": "accelerate", "transformers_trainer": "transformers"},
}

pytestmark = [
    # lightning 2.6 uses what torch 2.14 deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    # Lightning's advice, which is not what an example on a few in-memory images needs.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # The Trainer pins memory unless told otherwise, also where there is no GPU.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_there_are_snippets_and_examples():
    assert [title for title, _ in SECTIONS] == ["`norm_layer` of torchvision's and timm's builders", *list(NEEDS)[:3]]
    assert set(EXAMPLES) == set(list(NEEDS)[3:])


@pytest.mark.parametrize(("title", "source"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_snippet_runs(title, source):
    if title in NEEDS:
        pytest.importorskip(NEEDS[title], reason=f"needs the extra [{NEEDS[title]}]")
    names = {"__name__": "snippet"}
    exec(compile(source, f"docs/adapters.md: {title}", "exec"), names)
    assert all(bool(parameter.isfinite().all()) for parameter in _model(names).parameters())


def _model(names):
    return names["model"] if "model" in names else names["trainer"].lightning_module


def load_example(name):
    pytest.importorskip(NEEDS[name], reason=f"needs the extra [{NEEDS[name]}]")
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    return example


@pytest.mark.parametrize("normalizer", ["gn+ws", "bcn-micro+ws"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_trains(name, normalizer):
    settings = ["--images", "41", "--images_per_forward", "2", "--images_per_step", "8", "--normalizer", normalizer]
    accuracy = load_example(name).main(settings)
    assert 0 < accuracy < 1


def test_two_accelerate_processes_equal_one(tmp_path):
    """Of 21 micro-batches, the last of one image: in the last of 6 steps one process has one and the other has none."""
    settings = ["--images", "41", "--images_per_forward", "2", "--images_per_step", "8", "--normalizer", "bcn-micro+ws"]
    load_example("accelerate_loop").main([*settings, "--save", str(tmp_path / "one.pt")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    script = [str(ROOT / "examples" / "accelerate_loop.py"), *settings, "--save", str(tmp_path / "two.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [*launch, "--nproc_per_node=2", *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
