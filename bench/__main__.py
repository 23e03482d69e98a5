"""Command line of the benchmarks: `python -m bench NAME [options]`, NAME one of `BENCHMARKS`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from batchless.runs.environment import describe_environment
from bench import detector, federated, inference, loading, memory, norms, step, weights
from bench.report import (
    busy_warning,
    comparison_json,
    comparison_lines,
    load_average,
    load_line,
    machine_line,
)

BENCHMARKS = {
    "weights": weights,
    "norms": norms,
    "step": step,
    "memory": memory,
    "detector": detector,
    "inference": inference,
    "loading": loading,
    "federated": federated,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` leaves out the time in which others had the processor; they still take bandwidth and caches. With one thread only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; print its tables as they are done, write the raw times where `--json` says."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    before = after = load_average()
    machine = {**describe_environment(seed=options.seed), "load_before": before}
    print(
        f"{machine_line(machine)}, {options.clock} clock",
        busy_warning(before, None, threads=options.threads) or "",
        sep="\n",
        flush=True,
    )
    done = []
    for comparison in BENCHMARKS[options.name].comparisons(
        repeats=options.repeats, seed=options.seed, clock=CLOCKS[options.clock], on_round=_progress
    ):
        print(*comparison_lines(comparison), "", sep="\n", flush=True)
        done.append(comparison_json(comparison))
        after = load_average()
        if options.json is not None:
            record = {
                "benchmark": options.name,
                "machine": machine,
                "clock": options.clock,
                "load_after": after,
                "comparisons": done,
            }
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(busy_warning(before, after, threads=options.threads) or load_line(before, after))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Performance comparisons in one process.")
    parser.add_argument(
        "name",
        choices=BENCHMARKS,
        help="weights, norms: standardizing, normalizing alone; step, detector: whole optimizer steps; memory: activations; "
        "inference: after fold; loading: files against learning from them; federated: rounds against their steps alone",
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw times here")
    options = parser.parse_args(arguments)
    if options.threads < 1 or (options.repeats is not None and options.repeats < 1):
        parser.error("--threads and --repeats must be 1 or more")
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu adds up the time of all threads: use --threads 1 with it")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: the folder {options.json.parent} does not exist: create it first")
    return options


def _progress(done: int, rounds: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == rounds else ""
        print(f"\rround {done} of {rounds}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
