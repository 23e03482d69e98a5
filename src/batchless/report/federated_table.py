"""Federated runs side by side: accuracy by method and by domain, at the last round and at the one validation chose."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from batchless.report.escape import markdown_text
from batchless.report.federated_names import method_names
from batchless.report.likeness import flatten, shared_config, unlike
from batchless.report.sample import Sample, trouble
from batchless.report.table import checked_accuracy, seed_of
from batchless.runs import Run, number

if TYPE_CHECKING:
    from rich.table import Table

MEAN = "mean"
Moment = Literal["last", "chosen"]
MOMENTS: Mapping[Moment, str] = {"last": "last round", "chosen": "round chosen by validation"}
AT: Mapping[Moment, str] = {"last": "at the last round", "chosen": "at the round chosen by validation"}
WITHOUT_EFFECT = ("out", "workers", "client_timeout", "checkpoint_rounds", "tensorboard")
"""Configuration keys that change where and how fast a run is, not what comes out; clients that were late are told of."""
UNSEEN = "data.unseen_domains"
"""Runs of one method may differ in this: they are never pooled, and compared only with runs that left out the same domains."""
_METHOD = ("algorithm", "mu", "freeze_after", "unseen", "server", "privacy")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The runs of one method that left the same domains without a client; they differ by nothing but the seed.

    Attributes:
        kind: the method: algorithm and normalizer, and every setting by which methods of the same two differ.
        name: the same, and the domains that were left out where not all runs left out the same.
        runs: all of them.
        scores: test accuracy by moment and by domain, and over all domains (`mean`); empty samples where there is none.
        failures: for each run that could not be done, why.
        unfinished: how many runs have not ended.
    """

    kind: str
    name: str
    runs: tuple[Run, ...]
    scores: Mapping[tuple[Moment, str], Sample]
    failures: tuple[str, ...]
    unfinished: int

    def score(self, domain: str = MEAN, *, moment: Moment = "last") -> Sample:
        """Return the accuracies on a domain."""
        return self.scores.get((moment, domain), Sample(accuracies=(), seeds=()))

    def figure(self, key: str) -> float | None:
        """Return the mean of a figure of the summaries, such as `bytes`; None where no run has it."""
        found = [number((run.summary or {}).get(key)) for run in self.runs]
        values = [value for value in found if value is not None]
        return fmean(values) if values else None

    def left_out(self) -> int:
        """Return how many times a client was left out of a round, in all runs together."""
        return round(sum(number((run.summary or {}).get("left_out")) or 0.0 for run in self.runs))

    def unseen(self) -> tuple[str, ...]:
        """Return the domains that had no client, and so are not in the mean."""
        return unseen_domains(self.runs[0])

    def trouble(self) -> str:
        """Say what did not come to an accuracy; empty if all did."""
        return trouble(self.score().n, self.failures, self.unfinished)


@dataclass(frozen=True, kw_only=True)
class FederatedComparison:
    """Methods (in the order first seen) by domains.

    Attributes:
        methods: the rows, one for each method and set of domains that it was trained without.
        domains: the columns; the mean over them is one more.
        shared: the configuration all runs have in common, dotted keys.
        warnings: one line per way in which the runs are not like for like.
    """

    methods: tuple[Method, ...]
    domains: tuple[str, ...]
    shared: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The methods, each once, whatever it was trained without."""
        return tuple(dict.fromkeys(method.kind for method in self.methods))

    @property
    def left_out(self) -> tuple[tuple[str, ...], ...]:
        """The sets of domains without a client; one empty set where all have clients."""
        return tuple(dict.fromkeys(method.unseen() for method in self.methods))

    def alike(self, method: Method, kind: str) -> Method | None:
        """Return the row of the method `kind` that left out the same domains as `method`, None if it was not run."""
        return next((one for one in self.methods if one.kind == kind and one.unseen() == method.unseen()), None)

    @property
    def columns(self) -> tuple[str, ...]:
        """The domains and their mean."""
        return (*self.domains, MEAN)

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The rounds there are accuracies of: without validation images there is only the last."""
        chosen = any(method.score(moment="chosen").n for method in self.methods)
        return ("last", "chosen") if chosen else ("last",)

    def markdown(self) -> str:
        """Return the accuracies as Markdown tables, mean +- sample standard deviation in percent, and the warnings."""
        parts = []
        for moment in self.moments:
            head = [f"test accuracy, %, {MOMENTS[moment]}", *self.columns, "n"]
            lines = [head, *(self._line(method, moment) for method in self.methods)]
            drawn = [[markdown_text(text) for text in line] for line in lines]
            drawn.insert(1, ["---", *("---:" for _ in head[1:])])
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in drawn))
        return "\n\n".join([*parts, *(markdown_text(warning) for warning in self.warnings)]) + "\n"

    def rich(self, *, title: str = "") -> "Table":
        """Return the accuracies of the last round, and the mean at the chosen one, as a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None, caption_justify="left")
        table.caption = Text("\n".join(self.warnings), style="yellow") if self.warnings else None
        table.add_column("test accuracy, %")
        chosen = "chosen" in self.moments
        for column in (*self.columns, *(["mean at the\nchosen round"] if chosen else []), "n"):
            table.add_column(Text(column), justify="right")
        for method in self.methods:  # Text: square brackets in a name are no markup
            line = self._line(method, "last")
            if chosen:
                line.insert(-1, method.score(moment="chosen").percent() or "-")
            table.add_row(*map(Text, line))
        return table

    def _line(self, method: Method, moment: Moment) -> list[str]:
        scores = [method.score(column, moment=moment) for column in self.columns]
        unseen = method.unseen()
        texts = [
            (score.percent() or "-") + (" (unseen)" if column in unseen and score.n else "")
            for column, score in zip(self.columns, scores, strict=True)
        ]
        lacking = f" ({method.trouble()})" if method.trouble() else ""
        return [f"{method.name}{lacking}", *texts, str(scores[-1].n)]


def federated_comparison(runs: Sequence[Run], *, ignore: Collection[str] = WITHOUT_EFFECT) -> FederatedComparison:
    """Group federated `runs` by method: by algorithm, normalizer, and every setting that varies between runs of the same two.

    Runs of one method that left out different domains are rows of their own. Whether runs are like for like is asked of
    those that left out the same.

    Args:
        runs: at least one, as `batchless federate` leaves them.
        ignore: dotted configuration keys which may differ without a word.

    Raises:
        ValueError: no runs, or a run without an algorithm or with a test accuracy that is none.
    """
    if not runs:
        raise ValueError("there are no runs to compare; give at least one run folder")
    groups: dict[tuple[str, tuple[str, ...]], list[Run]] = {}
    for run, kind in zip(runs, method_names(runs, ignore=(*ignore, UNSEEN)), strict=True):
        groups.setdefault((kind, unseen_domains(run)), []).append(run)
    left_out: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        left_out.setdefault(unseen_domains(run), []).append(run)
    names = {key: f"{key[0]} without {', '.join(key[1])}" if key[1] and len(left_out) > 1 else key[0] for key in groups}
    by_run = {id(run): names[key] for key, group in groups.items() for run in group}
    ignored = [*ignore, *_balanced_seeds(groups.values())]
    warnings = [
        line
        for group in left_out.values()
        for line in unlike(group, ignore=ignored, compared=compared_keys(runs), name=lambda run: by_run[id(run)])
    ]
    return FederatedComparison(
        methods=tuple(_method_of(key[0], names[key], group) for key, group in groups.items()),
        domains=tuple(dict.fromkeys(domain for run in runs for domain in tested_domains(run))),
        shared=shared_config(runs),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def compared_keys(runs: Sequence[Run]) -> list[str]:
    """Return the dotted configuration keys by which methods are meant to differ: algorithm, its settings, normalizer, seed."""
    keys = dict.fromkeys(key for run in runs for key in flatten(run.config))
    return ["seed", "normalizer", *(key for key in keys if key.partition(".")[0] in _METHOD)]


def _balanced_seeds(groups: Collection[Sequence[Run]]) -> list[str]:
    """Further seeds, such as the partition's, that take the same values in all methods: these are then alike."""
    methods = [[flatten(run.config) for run in group] for group in groups]
    keys = {key for method in methods for config in method for key in config if key.endswith(".seed")}
    return [
        key
        for key in keys
        if len({tuple(sorted(f"{config.get('seed')}/{config.get(key)}" for config in method)) for method in methods})
        == 1
    ]


def tested_domains(run: Run) -> list[str]:
    """Return the domains that the run was tested on, in the order they were logged."""
    tests = (record.get("domain") for record in run.metrics if record.get("kind") == "test")
    return list(dict.fromkeys(str(domain) for domain in tests if domain not in (None, MEAN)))


def unseen_domains(run: Run) -> tuple[str, ...]:
    """Return the domains that the run's configuration left without a client."""
    data = run.config.get("data")
    domains = data.get("unseen_domains") if isinstance(data, Mapping) else None
    return tuple(map(str, domains)) if isinstance(domains, list | tuple) else ()


def accuracies_at(run: Run, round_: float | None) -> dict[str, float]:
    """Return what the run logged as test accuracy of each domain in a round; the last such line counts, after a resume."""
    found = {}
    for record in run.metrics:
        if record.get("kind") == "test" and number(record.get("round")) == round_ and round_ is not None:
            accuracy = number(record.get("accuracy"))
            if accuracy is not None:
                found[str(record.get("domain"))] = accuracy
    return found


def _method_of(kind: str, name: str, runs: Sequence[Run]) -> Method:
    failures, unfinished = [], 0
    values: dict[tuple[Moment, str], list[tuple[float, int | None]]] = {}
    for run in runs:
        if run.summary is None:
            unfinished += 1
        elif "failed" in run.summary:
            failures.append(str(run.summary["failed"]))
        elif (accuracy := checked_accuracy(run, run.summary)) is None:
            failures.append(f"its test accuracy is {run.summary['test_accuracy']}")
        else:
            for key, found in _outcome(run, accuracy).items():
                values.setdefault(key, []).append((found, seed_of(run)))
    scores = {
        key: Sample(accuracies=tuple(found for found, _ in pairs), seeds=tuple(seed for _, seed in pairs))
        for key, pairs in values.items()
    }
    return Method(
        kind=kind, name=name, runs=tuple(runs), scores=scores, failures=tuple(failures), unfinished=unfinished
    )


def _outcome(run: Run, accuracy: float) -> dict[tuple[Moment, str], float]:
    summary = run.summary or {}
    rounds = [number(record.get("round")) for record in run.metrics if record.get("kind") == "test"]
    last = max((found for found in rounds if found is not None), default=None)
    outcome: dict[tuple[Moment, str], float] = {("last", domain): x for domain, x in accuracies_at(run, last).items()}
    outcome["last", MEAN] = accuracy
    chosen = number(summary.get("chosen_test_accuracy"))
    if chosen is not None:
        at = accuracies_at(run, number(summary.get("chosen_round")))
        outcome |= {("chosen", domain): x for domain, x in at.items()}
        outcome["chosen", MEAN] = chosen
    return outcome
