"""The app folder that `flwr run` takes: settings only, as both sides of a run are in `batchless.federated.flower`."""

import json
from collections.abc import Mapping
from pathlib import Path


def write_app(folder: Path, run_config: Mapping[str, bool | int | float | str]) -> None:
    """Write the folder.

    Args:
        folder: made if it is not there.
        run_config: settings of the run, as `run_config_of` gives them.
    """
    settings = "\n".join(f"{name} = {_toml(value)}" for name, value in run_config.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_APP.format(settings=settings), encoding="utf-8")


_APP = """\
[project]
name = "batchless-federation"
version = "1.0.0"
description = "Federated learning by batchless; the settings are those of `batchless federate --help`."
license = "Apache-2.0"
dependencies = ["batchless[flower]"]

[tool.flwr.app]
publisher = "batchless"

[tool.flwr.app.components]
serverapp = "batchless.federated.flower:server_app"
clientapp = "batchless.federated.flower:client_app"

[tool.flwr.app.config]
{settings}
"""


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # the one that TOML escapes and JSON does not
