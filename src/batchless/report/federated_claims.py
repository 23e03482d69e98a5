"""What the numbers of federated runs say about the methods, and what they do not say."""

from batchless.report.difference import Difference, difference
from batchless.report.federated_contents import choose_method
from batchless.report.federated_table import FederatedComparison, Method, Moment

_AT: dict[Moment, str] = {"last": "at the last round", "chosen": "at the round chosen by validation"}


def federated_claims(table: FederatedComparison, *, control: str | None = None) -> list[str]:
    """Return sentences computed from the numbers, each true of them and none going further.

    For every method, how much its mean over the domains is above or below the control's, and whether the 95 % interval of
    the difference allows to say so; at the last round, and at the round that validation chose. One seed is called no proof.
    """
    chosen = choose_method(table, control)
    if len(table.methods) < 2:
        return ["One method is no comparison: it needs runs of another algorithm or normalizer."]
    over = f"Mean test accuracy over {len(table.domains)} domains"
    sentences = []
    for moment in table.moments:
        base = chosen.score(moment=moment)
        if base.mean is None:
            sentences.append(
                f"{over} {_AT[moment]}: {chosen.name} has none ({chosen.trouble()}), so nothing is compared with it."
            )
            continue
        said = [
            _sentence(method, difference(method.score(moment=moment), base), moment)
            for method in table.methods
            if method is not chosen
        ]
        sentences.append(
            f"{over} {_AT[moment]}, against {chosen.name} with {_percent(chosen, moment)}: {'; '.join(said)}."
        )
    return sentences + _rankings(table) + _cautions(table)


def _sentence(method: Method, found: Difference | None, moment: Moment) -> str:
    if found is None:
        return f"{method.name} has no accuracy [{method.trouble() or 'no validation images'}]"
    points = f"{100 * abs(found.value):.1f} points {'above' if found.value >= 0 else 'below'}"
    said = f"{method.name} is {points} ({_percent(method, moment)})"
    if found.interval is None:
        return said
    low, high = (100 * end for end in found.interval)
    verdict = "" if low > 0 or high < 0 else ", which its spread over seeds may explain"
    return f"{said}, 95 % interval {low:+.1f} to {high:+.1f}{verdict}"


def _rankings(table: FederatedComparison) -> list[str]:
    """Say where the last round and the one chosen by validation disagree on the best method."""
    best = []
    for moment in table.moments:
        ranked = [
            (mean, method.name) for method in table.methods if (mean := method.score(moment=moment).mean) is not None
        ]
        best += [max(ranked)[1]] if ranked else []
    if len(set(best)) < 2:
        return []
    return [f"The best mean is {best[0]}'s at the last round, but {best[1]}'s at the round chosen by validation."]


def _cautions(table: FederatedComparison) -> list[str]:
    seeds = [method.score().n for method in table.methods if method.score().n]
    sentences = []
    if 1 in seeds:
        which = "Every accuracy here is" if set(seeds) == {1} else "Some accuracies here are"
        sentences.append(f"{which} from one seed, and one seed is no proof: repeat with other seeds to rely on it.")
    if any(method.score().n and method.failures for method in table.methods):
        sentences.append("Where only some seeds failed, the mean is over the others, and so is too good.")
    lost = [f"{method.name} {_times(method.left_out())}" for method in table.methods if method.left_out()]
    if lost:
        sentences.append(
            f"Clients were left out of rounds (they failed, were late, or sent what is no number): {', '.join(lost)}."
        )
    if table.warnings:
        sentences.append(
            "The runs are not like for like in everything: read the differences listed with the table first."
        )
    return sentences


def _percent(method: Method, moment: Moment) -> str:
    score = method.score(moment=moment)
    return f"{score.percent()} %, n = {score.n}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
