"""The whole idea in minutes: every combination trained, one page of what came out."""

import os
from collections.abc import Sequence
from pathlib import Path

from batchless.demo.config import DemoConfig
from batchless.demo.pool import AnyConfig, OnProgress, train_all
from batchless.report import Halves, compare_runs, write_page
from batchless.runs import read_run

_TITLES = {
    (True, False): "Batch statistics at one image per forward",
    (False, True): "Federated learning over domains",
    (True, True): "Where batch statistics fail: one image per forward, one domain per client",
}
"""Of the page, by whether runs of one place and runs of a federation are on it."""


def run_demo(config: DemoConfig, on_progress: OnProgress, *, commands: Sequence[str]) -> tuple[Path, Halves, list[str]]:
    """Train every combination and write `report.html`.

    Args:
        config: what is compared.
        on_progress: shows the progress.
        commands: how it was started, for the report.

    Returns:
        The page, the comparison and its findings.

    Raises:
        ValueError: the folder exists, or a wrong setting. A combination that cannot train (batch statistics of one
            value) is a result, not an error.
    """
    folder = Path(config.out)
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder with --out, or remove it")
    trained, federated = config.runs(), config.federated_runs()
    # A federated run takes longest: what is left at the end is short.
    train_all([*federated, *trained], on_progress, processes=config.processes or os.cpu_count() or 1)
    by_normalizer = [run for normalizer in config.normalizers for run in trained if run.normalizer == normalizer]
    ordered: list[AnyConfig] = [*by_normalizer, *federated]
    runs = [read_run(run.folder()) for run in ordered]
    halves = compare_runs(runs)
    findings = halves.findings()
    page = folder / "report.html"
    title = _TITLES[bool(trained), bool(federated)]
    write_page(page, runs, title=title, findings=findings, commands=commands)
    return page, halves, findings
