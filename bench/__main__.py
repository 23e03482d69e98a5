"""Command line of the benchmarks: `python -m bench NAME [options]`, NAME one of `BENCHMARKS`."""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from batchless.report.timings import BENCH, COMPARISONS, machine_line
from batchless.runs import RunFolder
from batchless.runs.atomic import write_text
from batchless.runs.environment import describe_environment
from batchless.runs.folder import strict_json
from bench import (
    compiled,
    detector,
    federated,
    inference,
    lean_targets,
    loading,
    memory,
    norms,
    passes,
    step,
    step_targets,
    tasks,
    weights,
)
from bench.report import (
    busy_warning,
    comparison_json,
    comparison_lines,
    load_average,
    load_line,
)

BENCHMARKS = {
    "weights": weights,
    "norms": norms,
    "passes": passes,
    "step": step,
    "step-targets": step_targets,
    "memory": memory,
    "lean-targets": lean_targets,
    "compiled": compiled,
    "detector": detector,
    "tasks": tasks,
    "inference": inference,
    "loading": loading,
    "federated": federated,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` leaves out the time in which others had the processor; they still take bandwidth and caches. With one thread only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; print its tables as they are done, and leave them in the run folder that `--out` names."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        folder = (
            None if options.out is None else RunFolder.create(options.out, config=_config(options), seed=options.seed)
        )
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    with ExitStack() as ending:
        if folder is not None:
            ending.enter_context(folder)
        _run(options, folder)
    return 0


def _run(options: argparse.Namespace, folder: RunFolder | None) -> None:
    before = after = load_average()
    began = time.perf_counter()
    print(
        f"{machine_line(describe_environment(seed=options.seed))}, {options.clock} clock",
        busy_warning(before, None, threads=options.threads) or "",
        sep="\n",
        flush=True,
    )
    done = []
    try:
        for comparison in BENCHMARKS[options.name].comparisons(
            repeats=options.repeats, seed=options.seed, clock=CLOCKS[options.clock], on_round=_progress
        ):
            print(*comparison_lines(comparison), "", sep="\n", flush=True)
            done.append(comparison_json(comparison))
            after = load_average()
            if folder is not None:
                write_text(folder.path / COMPARISONS, strict_json(done, indent=1))
    except BaseException as error:
        if folder is not None:
            folder.finish({"failed": " ".join(str(error).split()) or type(error).__name__})
        raise
    load = busy_warning(before, after, threads=options.threads) or load_line(before, after)
    print(load)
    if folder is not None:
        folder.finish({"load": load, "seconds": time.perf_counter() - began})
        print(f"run folder {folder.path}; batchless compare shows it")


def _config(options: argparse.Namespace) -> dict[str, object]:
    # The keys are the options, so that the report can say how to repeat the run.
    given = {"repeats": options.repeats} if options.repeats is not None else {}
    return {
        "kind": BENCH,
        "benchmark": options.name,
        **given,
        "threads": options.threads,
        "clock": options.clock,
        "seed": options.seed,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Performance comparisons in one process.")
    parser.add_argument(
        "name",
        choices=BENCHMARKS,
        help="weights, norms: standardizing, normalizing alone; passes: normalizing's kernels; step, detector: whole "
        "optimizer steps; step-targets: those that a target names, in pairs; memory: activations; compiled: torch.compile "
        "and bfloat16; inference: after fold; loading: files against learning from them; federated: rounds against their "
        "steps alone",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (1)")
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=", ".join(f"{name} {benchmark.REPEATS}" for name, benchmark in BENCHMARKS.items()),
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall time, or the process's own (wall)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, data and the order of turns (0)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="leave tables and all raw times here, for batchless compare"
    )
    options = parser.parse_args(arguments)
    if options.threads < 1 or (options.repeats is not None and options.repeats < 1):
        parser.error("--threads and --repeats must be 1 or more")
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu adds up the time of all threads: use --threads 1 with it")
    return options


def _progress(done: int, rounds: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == rounds else ""
        print(f"\rround {done} of {rounds}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
