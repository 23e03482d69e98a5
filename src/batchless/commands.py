"""What each verb of the command shows and returns: the exit status."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from batchless.advise import ConvertConfig, DoctorConfig, PlanConfig, run_convert, run_doctor, run_plan
from batchless.arguments import CompareConfig, ExplainConfig, ResumeConfig
from batchless.demo import DemoConfig, run_demo
from batchless.deploy import (
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
    evaluate_checkpoint,
    evaluation_tables,
    export_checkpoint,
    predict_checkpoint,
    prediction_table,
)
from batchless.federated import (
    FederateConfig,
    FinishedFederation,
    RoundProgress,
    explain_federation,
    leave_one_domain_out,
    resume_federation,
    run_federation,
)
from batchless.federated.loopback import federate_on_loopback, resume_on_loopback
from batchless.report import compare_runs, render_json, render_markdown, write_page
from batchless.report.main_figure import main_figure
from batchless.runs import Run, find_runs, read_run
from batchless.runs.atomic import write_text
from batchless.runs.folder import CONFIG
from batchless.tasks import FinishedRun, TrainConfig, resume_training, run_training
from batchless.train import stop_on_signals
from batchless.train.interrupt import ShouldStop, TrainingStoppedError
from batchless.train.loop import OnProgress
from batchless.train.waiting import advice_on_waiting

INTERRUPTED = 130
_FOUND_SOMETHING = 1


class StoppedError(Exception):
    """The user has stopped a run; the message says how to go on."""


def train(config: TrainConfig) -> int:
    """Train one network."""

    def run(on_progress: OnProgress, should_stop: ShouldStop) -> FinishedRun:
        return run_training(config, on_progress, should_stop=should_stop)

    return _train(f"{config.normalizer} at {config.images_per_forward}", config.images, config.folder(), run)


def resume(config: ResumeConfig) -> int:
    """Go on with an interrupted run."""
    begun = read_run(config.resume).config

    def run(on_progress: OnProgress, should_stop: ShouldStop) -> FinishedRun:
        return resume_training(
            config.resume, on_progress, should_stop=should_stop, device=config.device, root=config.root
        )

    title = f"{begun.get('normalizer')} at {begun.get('images_per_forward')}"
    return _train(title, begun.get("images"), Path(config.resume), run)


def _train(title: str, images: int | None, folder: Path, run: Callable[[OnProgress, ShouldStop], FinishedRun]) -> int:
    import os

    from rich.console import Console

    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # under torchrun the first process speaks for all
    try:
        with _progress(console) as progress, stop_on_signals() as should_stop:
            bar = progress.add_task(title, total=images, figures="")

            def on_progress(images: int, figures: Mapping[str, float]) -> None:
                progress.update(bar, completed=images, figures=_figures(figures))

            finished = run(on_progress, should_stop)
    except TrainingStoppedError as stopped:
        raise StoppedError(
            f"stopped after {stopped.images} images, all saved; go on with: batchless train --resume {folder}"
        ) from stopped
    for note in finished.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    if console.quiet:
        return 0
    run_read = read_run(finished.folder)
    console.print(compare_runs([run_read]).rich())
    figures, main = finished.summary, main_figure(run_read)
    workers = (run_read.config.get("data") or {}).get("workers", 0)
    if advice := advice_on_waiting(figures["waiting_share"], workers=workers):
        console.print(advice, markup=False, highlight=False)
    console.print(
        f"{main.title} {100 * figures[f'test_{main.name}']:.1f} %, {figures['images_per_second']:.0f} images/s; "
        f"run folder {finished.folder}",
        markup=False,
        highlight=False,
    )
    return 0


def federate(config: FederateConfig) -> int:
    """Train over clients, once or without each domain in turn."""
    if config.leave_one_domain_out:
        return _leave_one_domain_out(config)

    def run(on_round: Callable[[RoundProgress], None], should_stop: ShouldStop) -> FinishedFederation:
        federate = federate_on_loopback if config.engine == "flower" else run_federation
        return federate(config, on_round, should_stop=should_stop, on_start=print)

    return _federate(f"{config.algorithm}, {config.resolved_normalizer()}", config.rounds, config.folder(), run)


def _leave_one_domain_out(config: FederateConfig) -> int:
    import os

    from rich.console import Console

    def run_one(one: FederateConfig, begun: bool) -> int:
        print(f"without {one.data.unseen_domains[0]}: {one.folder()}")
        return resume_federate(ResumeConfig(verb="federate", resume=str(one.folder()))) if begun else federate(one)

    folders = leave_one_domain_out(config, run_one)
    table = compare_runs([read_run(folder) for folder in folders]).unseen
    assert table is not None  # one run for each of two domains or more
    Console(quiet=os.environ.get("RANK", "0") != "0").print(table.rich())
    return 0


def resume_federate(config: ResumeConfig) -> int:
    """Go on with an interrupted federated run."""
    begun = read_run(config.resume).config

    def run(on_round: Callable[[RoundProgress], None], should_stop: ShouldStop) -> FinishedFederation:
        resume = resume_on_loopback if begun.get("engine") == "flower" else resume_federation
        return resume(config.resume, on_round, should_stop=should_stop, device=config.device, root=config.root)

    title = f"{begun.get('algorithm')}, {begun.get('normalizer')}"
    return _federate(title, begun.get("rounds"), Path(config.resume), run)


def explain(config: ExplainConfig) -> int:
    """What a federated run would share."""
    print(explain_federation(config.run))
    return 0


def _federate(
    title: str,
    rounds: int | None,
    folder: Path,
    run: Callable[[Callable[[RoundProgress], None], ShouldStop], FinishedFederation],
) -> int:
    import os

    from rich.console import Console

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    try:
        with _progress(console) as progress, stop_on_signals() as should_stop:
            bar = progress.add_task(title, total=rounds, figures="")

            def on_round(state: RoundProgress) -> None:
                done = state.round - 1 + state.clients / max(state.clients_in_round, 1)
                progress.update(bar, completed=round(done, 2), figures=_figures(state.figures))

            finished = run(on_round, should_stop)
    except TrainingStoppedError as stopped:
        if not (folder / CONFIG).exists():  # Flower was still starting
            raise StoppedError(f"stopped before the run began: there is no run in {folder} to go on with") from stopped
        raise StoppedError(
            f"stopped after {stopped.images} images, all saved; go on with: batchless federate --resume {folder}"
        ) from stopped
    console.print(compare_runs([read_run(finished.folder)]).rich(title="Test accuracy"))
    console.print(
        f"mean over domains {100 * finished.summary['test_accuracy']:.1f} %; run folder {finished.folder}",
        markup=False,
        highlight=False,
    )
    return 0


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.0f}" if name == "images/s" else f"{name} {value:.3f}" for name, value in figures.items()
    )


def demo(config: DemoConfig, command: str) -> int:
    """Train every combination, write the report."""
    import time

    from rich.console import Console

    console = Console()
    started = time.perf_counter()
    trained, federated = config.runs(), config.federated_runs()
    console.print(f"{len(trained)} runs of {config.train.images} images each, {config.train.model}", markup=False)
    if federated:
        domains = config.federate.data.root or "the embedded domains"
        of = f"{config.federate.rounds} rounds each over {domains}, {config.federate.model}"
        console.print(f"{len(federated)} federated runs of {of}", markup=False)
    with _progress(console) as progress:
        bar = progress.add_task("runs", total=len(trained) + len(federated), figures="the first ones take longest")
        page, halves, findings = run_demo(
            config,
            lambda what, done, _: progress.update(
                bar, completed=round(done, 2), figures=what or "the first ones take longest"
            ),
            commands=[command],
        )
    if halves.trained is not None:
        console.print(halves.trained.rich(title=f"Test {halves.trained.figure.word}"))
    if halves.federated is not None:
        console.print(halves.federated.rich(title="Federated: test accuracy by domain"))
    for finding in findings:
        console.print(f"- {finding}", markup=False, highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s; report: {page.resolve()}", markup=False, highlight=False)
    return 0


def compare(config: CompareConfig, command: str) -> int:
    """Print or write the comparison of runs."""
    from rich.console import Console

    runs: list[Run] = [run for folder in config.folders for run in find_runs(folder)]
    if not runs:
        raise ValueError(f"no run folder in {', '.join(config.folders)}: name folders that hold a config.yaml")
    table = compare_runs(runs)
    contents: Any = {
        "title": "Comparison of runs",
        "findings": table.findings(control=config.control),
        "commands": [command],
        "control": config.control,
    }
    match config.form():
        case "table":
            _give(table.markdown() if config.out is not None else None, config.out)
        case "html":
            write_page(str(config.out), runs, **contents)
        case "markdown":
            _give(render_markdown(runs, **contents), config.out)
        case "json":
            _give(render_json(runs, **contents), config.out)
    if config.out is not None or config.form() == "table":
        Console().print(table.rich())
    if config.out is not None:
        print(Path(config.out).resolve())
    return 0


def _give(text: str | None, out: str | None) -> None:
    if text is None:
        return
    if out is None:
        print(text, end="")
    else:
        write_text(Path(out), text)


def evaluate(config: EvaluateConfig) -> int:
    """Accuracy of a checkpoint."""
    from rich.console import Console

    Console().print(evaluation_tables(evaluate_checkpoint(config)))
    return 0


def predict(config: PredictConfig) -> int:
    """The classes of images; 1 if one of them could not be read."""
    from rich.console import Console

    predictions = predict_checkpoint(config)
    Console().print(prediction_table(predictions))
    return _FOUND_SOMETHING if any(prediction.error is not None for prediction in predictions) else 0


def export(config: ExportConfig) -> int:
    """Write a checkpoint without our layers."""
    print(export_checkpoint(config))
    return 0


def doctor(config: DoctorConfig) -> int:
    """What breaks at few images per forward; 1 if something does."""
    diagnosis = run_doctor(config)
    print(diagnosis)
    return 0 if diagnosis.ok else _FOUND_SOMETHING


def convert(config: ConvertConfig) -> int:
    """What a normalizer replaces in a model."""
    print(run_convert(config))
    return 0


def plan(config: PlanConfig) -> int:
    """What fits in a memory; 1 if nothing does."""
    planned = run_plan(config)
    print(planned.json() if config.format == "json" else planned)
    return 0 if planned.fits else _FOUND_SOMETHING


def _progress(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
    )
