"""The report as strict JSON, for other programs: shares instead of percentages, nothing rounded."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from batchless.report.contents import Contents
from batchless.report.difference import Difference
from batchless.report.federated_contents import FederatedContents
from batchless.report.federated_rows import LEFT_OUT, PRIVACY, privacy_rows
from batchless.report.federated_table import Method, Moment
from batchless.report.gather import Report, gather
from batchless.report.pictures import Gallery
from batchless.report.table import Cell
from batchless.report.timings import Benchmark
from batchless.report.unseen_table import UnseenComparison
from batchless.runs import Run


def render_json(
    runs: Sequence[Run],
    *,
    title: str,
    findings: Sequence[str],
    commands: Sequence[str],
    control: str | None = None,
) -> str:
    """Return the comparison of `runs` as strict JSON; the arguments are those of `write_page`.

    What no finite number is becomes null or, where a run folder says so, the text "nan". Pictures are left out.
    """
    report = gather(runs, title=title, findings=findings, commands=commands, control=control)
    return json.dumps(_plain(_report(report)), indent=2, allow_nan=False, default=str) + "\n"


def _report(report: Report) -> dict[str, Any]:
    halves: dict[str, dict[str, Any]] = {}
    if report.trained is not None:
        halves["trained"] = _trained(report.trained)
    if report.federated is not None:
        halves["federated"] = _federated(report.federated)
    return {
        "title": report.title,
        "findings": report.findings,
        **(next(iter(halves.values())) if len(halves) == 1 else halves),  # the usual report is not nested
        **({"benchmarks": [_benchmark(one) for one in report.benchmarks]} if report.benchmarks else {}),
        "commands": report.commands,
        "notes": report.notes,
    }


def _trained(contents: Contents) -> dict[str, Any]:
    cells = zip(contents.table.cells, contents.differences, strict=True)
    return {
        "warnings": contents.table.warnings,
        "control": {
            "normalizer": contents.control.normalizer,
            "images_per_forward": contents.control.images_per_forward,
        },
        "cells": [_cell(cell, difference) for cell, difference in cells],
        "runs": [_run(run) for run in contents.runs],
        "shared_configuration": contents.table.shared,
        "conversions": [asdict(conversion) for conversion in contents.conversions],
        "predictions": [_predictions(gallery) for gallery in contents.galleries],
    }


def _federated(contents: FederatedContents) -> dict[str, Any]:
    return {
        "warnings": contents.table.warnings,
        "control": contents.control.name,
        "domains": contents.table.domains,
        "methods": [_method(contents, method) for method in contents.table.methods],
        **({} if contents.unseen is None else {"unseen": _unseen(contents.unseen)}),
        "level_percent": contents.level,
        "convergence": [asdict(one) for one in contents.convergence],
        "privacy": [dict(zip(PRIVACY, line, strict=True)) for line in privacy_rows(contents)],
        "left_out": [dict(zip(LEFT_OUT, line, strict=True)) for line in contents.left_out],
        "partitions": [asdict(partition) for partition in contents.partitions],
        "runs": [_run(run) for run in contents.runs],
        "shared_configuration": contents.table.shared,
        "conversions": [asdict(conversion) for conversion in contents.conversions],
    }


def _unseen(table: UnseenComparison) -> dict[str, Any]:
    return {name: {moment: table.accuracies(name, moment) for moment in table.moments} for name in table.methods}


def _method(contents: FederatedContents, method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "accuracy": {
            moment: {column: _score(contents, method, moment, column) for column in contents.table.columns}
            for moment in contents.table.moments
        },
        "bytes": method.figure("bytes"),
        "images": method.figure("images"),
        "seconds": method.figure("seconds"),
        "clients_left_out": method.left_out(),
        "failures": method.failures,
        "unfinished": method.unfinished,
    }


def _score(contents: FederatedContents, method: Method, moment: Moment, column: str) -> dict[str, Any]:
    score = method.score(column, moment=moment)
    found = contents.differences.get((method.name, moment, column))
    return {
        "mean": score.mean,
        "sd": score.sd,
        "n": score.n,
        "accuracies": score.accuracies,
        "seeds": score.seeds,
        "difference": None if found is None else asdict(found),
    }


def _cell(cell: Cell, difference: Difference | None) -> dict[str, Any]:
    return {
        "normalizer": cell.normalizer,
        "images_per_forward": cell.images_per_forward,
        "mean": cell.mean,
        "sd": cell.sd,
        "n": cell.n,
        "accuracies": cell.accuracies,
        "seeds": cell.seeds,
        "images_per_second": cell.speed,
        "waiting_share": cell.wait,
        "peak_memory_bytes": cell.memory,
        "failures": cell.failures,
        "unfinished": cell.unfinished,
        "difference": None if difference is None else asdict(difference),
    }


def _run(run: Run) -> dict[str, Any]:
    return {"folder": run.path, "config": run.config, "environment": run.environment, "summary": run.summary}


def _benchmark(benchmark: Benchmark) -> dict[str, Any]:
    return {**_run(benchmark.run), "comparisons": [asdict(timing) for timing in benchmark.timings]}


def _predictions(gallery: Gallery) -> dict[str, Any]:
    shown = [asdict(prediction) for prediction in gallery.predictions]
    return {"folder": gallery.run.path, "shown": [{k: v for k, v in one.items() if k != "uri"} for one in shown]}


def _plain(value: Any) -> Any:
    """Return `value` with texts for keys and for numbers that strict JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
