"""Flower's flat run configuration, which knows numbers and texts only, and ours; what a SuperNode is told of itself."""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from batchless.federated.config import FederateConfig
from batchless.federated.site import Site
from batchless.runs.atomic import write_text

RESUME = "resume"
"""The key of the run configuration that says whether to go on with the run in `out`."""

_NAME = "flower.json"
_NODE_KEYS = ("partition-id", "num-partitions", "data-root", "state-folder", "device")


def config_of(run_config: Mapping[str, Any]) -> FederateConfig:
    """The run that a run configuration asks for: settings by their dotted names, lists as the text `[a, b]`.

    ValueError for one that there is not, or that is wrong.

    >>> config_of({"algorithm": "fedbn", "data.domains": "[plain, photos]", "optimizer.learning_rate": 0.1}).data.domains
    ('plain', 'photos')
    """
    plain: dict[str, Any] = FederateConfig().plain() | {"engine": "flower", "normalizer": None}
    for key, value in run_config.items():
        if key == RESUME:
            continue
        *groups, name = key.split(".")
        place: Any = plain
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            raise ValueError(f"there is no setting {key}: `batchless federate --help` lists them")
        place[name] = yaml.safe_load(value) if isinstance(value, str) and value.startswith("[") else value
    return FederateConfig.from_plain(plain, source="the run configuration")


def run_config_of(config: FederateConfig) -> dict[str, bool | int | float | str]:
    """The inverse of `config_of`: all settings but those that are None, as there they are by themselves."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in _flat(config):
        if isinstance(value, tuple):
            found[name] = yaml.safe_dump(list(value), default_flow_style=True, width=float("inf")).strip()
        elif value is not None:
            found[name] = value
    return found


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for item in fields(settings):
        value, name = getattr(settings, item.name), f"{prefix}{item.name}"
        pairs += _flat(value, f"{name}.") if is_dataclass(value) else [(name, value)]
    return pairs


def site_of(node_config: Mapping[str, Any]) -> Site:
    """The machine that the `--node-config` of a SuperNode describes.

    `partition-id`: the clients here, such as `0` or `"0,1"`; `data-root`: of the data here; `state-folder`: where what stays
    with the clients is kept, by default `batchless` in Flower's own folder; `device`.

    ValueError for another key, or without clients.
    """
    if odd := sorted(set(node_config) - set(_NODE_KEYS)):
        raise ValueError(f"--node-config has {odd[0]!r}: possible are {', '.join(_NODE_KEYS)}")
    try:
        clients = frozenset(int(word) for word in str(node_config["partition-id"]).split(","))
    except (KeyError, ValueError) as error:
        raise ValueError(
            '--node-config needs the clients of this node, such as partition-id=0 or partition-id="0,1"'
        ) from error
    folder = node_config.get("state-folder", f"{os.environ.get('FLWR_HOME', '~/.flwr')}/batchless")
    root, device = (node_config.get(key) for key in ("data-root", "device"))
    return Site(
        clients=clients,
        folder=Path(str(folder)).expanduser(),
        root=None if root is None else str(root),
        device=None if device is None else str(device),
    )


def run_name(folder: Path) -> str:
    """The run's name on its clients' disks, made when it first begins."""
    file = folder / _NAME
    if not file.exists():
        write_text(file, json.dumps({"run": secrets.token_hex(8)}))
    name: str = json.loads(file.read_text())["run"]
    return name
