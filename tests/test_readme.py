"""Every example in the README runs as it stands."""

import re
from pathlib import Path

import pytest

from batchless.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = re.findall(r"^    batchless (.*?)(?:\s+#.*)?$", README, flags=re.M)


@pytest.mark.parametrize("source", PYTHON, ids=range(len(PYTHON)))
def test_python_example_runs(source, capsys):
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    kinds = {type(module).__module__ for module in names["plain"].modules()}
    assert all(kind.startswith(("torch.", "torchvision.")) for kind in kinds)
    assert "BatchChannelNorm" in capsys.readouterr().out


def test_there_are_examples():
    assert PYTHON
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", sorted({command.split()[0] for command in COMMANDS}))
def test_command_exists(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()
