"""What a federated run's method is called: its algorithm, its normalizer, and what else tells it from the others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from batchless.report.likeness import flatten, say
from batchless.runs import Run


def method_names(runs: Sequence[Run], *, ignore: Collection[str]) -> list[str]:
    """Return the name of each run's method; runs that differ by their seed alone have the same.

    A configuration key that varies between runs of the same algorithm and normalizer is in the name of every run that has it.

    Raises:
        ValueError: a run without an algorithm.
    """
    bases = [_base(run) for run in runs]
    configs = [_told_apart_by(run.config, ignore=ignore) for run in runs]
    varying: dict[str, None] = {}
    for base in dict.fromkeys(bases):
        group = [config for config, own in zip(configs, bases, strict=True) if own == base]
        for key in dict.fromkeys(key for config in group for key in config):
            if len({say(config.get(key)) for config in group}) > 1:
                varying[key] = None
    names = []
    for (algorithm, normalizer), config in zip(bases, configs, strict=True):
        settings = [f"{key}={say(config[key])}" for key in varying if config.get(key) is not None]
        inner = ", ".join([*([normalizer] if normalizer else []), *settings])
        names.append(f"{algorithm} ({inner})" if inner else algorithm)
    return names


def algorithm_name(config: Mapping[str, Any]) -> str | None:
    """Return the algorithm of a configuration; None if it says none."""
    value = config.get("algorithm")
    value = value.get("name") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def _base(run: Run) -> tuple[str, str]:
    algorithm = algorithm_name(run.config)
    if algorithm is None:
        raise ValueError(
            f"{run.path / 'config.yaml'}: algorithm is {run.config.get('algorithm')!r}; its name is needed to compare the run"
        )
    normalizer = run.config.get("normalizer")
    return algorithm, normalizer if isinstance(normalizer, str) else ""


def _told_apart_by(config: Mapping[str, Any], *, ignore: Collection[str]) -> dict[str, Any]:
    flat = flatten(config)
    keys = [key for key in flat if key not in ignore and key.rpartition(".")[2] != "seed"]
    return {key: flat[key] for key in keys if key not in ("kind", "normalizer", "algorithm", "algorithm.name")}
