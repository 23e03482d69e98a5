"""What runs have in common, and every way in which they are not like for like."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from batchless.runs import Run

COMPARED = ("normalizer", "images_per_forward", "seed")
Named = Callable[[Run], str]
"""What a run is called in a sentence about several: all its repetitions with other seeds are called the same."""
MACHINE = ("cpu", "cores", "gpu", "torch", "torch_threads", "batchless", "git_commit")


def cell_name(run: Run) -> str:
    """Return the cell of an ordinary run in words."""
    return f"{run.config['normalizer']} at {run.config['images_per_forward']}"


def shared_config(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the dotted configuration keys that have one and the same value in all runs."""
    configs = [flatten(run.config) for run in runs]
    return {key: value for key, value in configs[0].items() if all(_same(one, configs[0], key) for one in configs)}


def unlike(
    runs: Sequence[Run], *, ignore: Collection[str], compared: Collection[str] = COMPARED, name: Named | None = None
) -> list[str]:
    """Return one line per difference between the runs other than in what is `compared`: normalizer, images per forward, seed.

    Looked at are the configuration (dotted keys, but for those in `ignore`), the images seen by runs that ended, and
    the machine and versions. A seed counted twice in one cell is a line as well: it makes n larger, not the evidence.
    """
    ended = [run.summary for run in runs if run.summary is not None and "failed" not in run.summary]
    configs = [flatten(run.config) for run in runs]
    machines = [{f"the machine's {key}": run.environment.get(key) for key in MACHINE} for run in runs]
    return [
        *_differences([_without(config, {*compared, *ignore}) for config in configs]),
        *_differences([{"the number of images seen": summary.get("images")} for summary in ended]),
        *_differences(machines),
        *_repeated_seeds(runs, name or (lambda run: f"{cell_name(run)} images per forward")),
    ]


def varied(
    runs: Sequence[Run],
    *,
    ignore: Collection[str] = ("out",),
    compared: Collection[str] = COMPARED,
    name: Named = cell_name,
) -> list[tuple[str, str, str]]:
    """Return each configuration key that is not the same everywhere, each of its values, and which runs have it."""
    configs = [_without(flatten(run.config), {*compared, *ignore}) for run in runs]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config):
        who: dict[str, Counter[str]] = {}
        for run, config in zip(runs, configs, strict=True):
            who.setdefault(say(config.get(key)), Counter())[name(run)] += 1
        if len(who) > 1:
            rows += [
                (key, value, ", ".join(f"{cell} ({_runs(count)})" for cell, count in cells.items()))
                for value, cells in who.items()
            ]
    return rows


def flatten(config: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, prefix=f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def _same(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    return key in one and bool(one[key] == other[key])


def _differences(values: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for key in dict.fromkeys(key for mapping in values for key in mapping):
        counts = Counter(say(mapping.get(key)) for mapping in values)
        if len(counts) > 1:
            found = ", ".join(f"{value} ({_runs(count)})" for value, count in counts.items())
            lines.append(f"not like for like: {key} is {found}")
    return lines


def _repeated_seeds(runs: Sequence[Run], name: Named) -> list[str]:
    counts = Counter((name(run), say(run.config.get("seed"))) for run in runs)
    return [
        f"not independent: {cell} has seed {seed} {count} times; its n and sd mislead"
        for (cell, seed), count in counts.items()
        if count > 1
    ]


def say(value: object) -> str:
    """Return a configuration's value as a text."""
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
