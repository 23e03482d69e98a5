"""Leave-one-domain-out: the same run once for each domain, which then has no client and is only tested on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from batchless.data import open_domains
from batchless.federated.config import FederateConfig
from batchless.runs import read_run
from batchless.train import processes_of_torchrun

_MAY_DIFFER = ("out", "workers", "device", "client_timeout", "tensorboard")
"""Settings that an interrupted sweep may go on with another value of."""

RunOne = Callable[[FederateConfig, bool], object]
"""`run_one(config, begun)`: train it; go on with it, if it was begun."""


def without_each_domain(config: FederateConfig) -> list[FederateConfig]:
    """The runs that `config` stands for: one for each of its domains, in a folder of that name within the run folder.

    Raises:
        ValueError: one domain only, domains that are unseen already, or data that is not there.
    """
    data = config.data
    if data.unseen_domains:
        raise ValueError(
            f"leave_one_domain_out leaves each domain out in turn: data.unseen_domains must be empty, got "
            f"{', '.join(data.unseen_domains)}"
        )
    domains = data.domains or tuple(open_domains(data.root, "train", classes=data.classes))
    if len(domains) < 2:
        raise ValueError(f"leave_one_domain_out needs two domains or more, there is {', '.join(domains)}")
    return [
        replace(
            config,
            leave_one_domain_out=False,
            data=replace(data, unseen_domains=(domain,)),
            out=str(config.folder() / f"without-{domain.replace('/', '-')}"),
        )
        for domain in domains
    ]


def leave_one_domain_out(config: FederateConfig, run_one: RunOne) -> list[Path]:
    """Train once without each domain; runs that have ended are not done again, those that were interrupted or failed go on.

    Args:
        config: of all runs; the same one, given again, goes on with what is not done.
        run_one: trains, or goes on with, one of them.

    Returns:
        The run folders.

    Raises:
        ValueError: as `without_each_domain`, a folder with a run of other settings, or what `run_one` raises.
    """
    runs = without_each_domain(config)
    with processes_of_torchrun(config.device) as (processes, _):
        # All processes have looked before the first one begins to write.
        begun = processes.gather([_begun(one) for one in runs])[0]
        for one, state in zip(runs, begun, strict=True):
            if state != "ended":
                run_one(one, state == "begun")
    return [one.folder() for one in runs]


def _begun(config: FederateConfig) -> str:
    """`new`, `begun` or `ended`."""
    folder = config.folder()
    if not (folder / "config.yaml").exists():
        return "new"
    run = read_run(folder)
    earlier, now = FederateConfig.from_plain(run.config, source=folder / "config.yaml").plain(), config.plain()
    for name, value in now.items():
        if name not in _MAY_DIFFER and earlier[name] != value:
            raise ValueError(
                f"{folder} holds a run of other settings ({name} is {earlier[name]}, not {value}): choose another --out"
            )
    return "ended" if run.summary is not None and "failed" not in run.summary else "begun"
