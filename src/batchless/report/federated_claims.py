"""What the numbers of federated runs say about the methods, and what they do not say."""

from collections.abc import Sequence

from batchless.report.difference import Difference, difference, interval_text, points_text
from batchless.report.federated_contents import choose_method
from batchless.report.federated_table import AT, FederatedComparison, Method, Moment
from batchless.report.unseen_table import unseen_comparison


def federated_claims(table: FederatedComparison, *, control: str | None = None) -> list[str]:
    """Return sentences computed from the numbers, each true of them and none going further.

    For every method, how much its mean over the domains is above or below the control's, and whether the 95 % interval of
    the difference allows to say so; at the last round, and at the round that validation chose. One seed is called no proof.
    Only runs that left the same domains without a client are compared. Where domains were left out in turn, what is compared
    is the accuracy on those (`UnseenComparison.findings`).
    """
    chosen, unseen = choose_method(table, control), unseen_comparison(table)
    left_out = [] if unseen is None else unseen.findings(control=chosen.kind)
    if len(table.kinds) < 2:
        return ["One method is no comparison: it needs runs of another algorithm or normalizer.", *left_out]
    sentences: list[str] = []
    for without in table.left_out:
        if unseen is None or len(without) != 1:
            rows = [method for method in table.methods if method.unseen() == without]
            sentences += _differences(table, rows, chosen.kind) + _rankings(table, rows)
    return sentences + left_out + _cautions(table)


def _differences(table: FederatedComparison, rows: Sequence[Method], control: str) -> list[str]:
    """Compare the methods that left out the same domains."""
    chosen = next((method for method in rows if method.kind == control), None)
    others = [method for method in rows if method is not chosen]
    if chosen is None or not others:
        names = ", ".join(method.name for method in others)
        return [] if chosen is not None else [f"{control} was not run without the same domains as {names}."]
    over = f"Mean test accuracy over {len(set(table.domains) - set(chosen.unseen()))} domains"
    sentences = []
    for moment in table.moments:
        base = chosen.score(moment=moment)
        if base.mean is None:
            sentences.append(
                f"{over} {AT[moment]}: {chosen.name} has none ({chosen.trouble()}), so nothing is compared with it."
            )
            continue
        said = [_sentence(method, difference(method.score(moment=moment), base), moment) for method in others]
        sentences.append(
            f"{over} {AT[moment]}, against {chosen.name} with {_percent(chosen, moment)}: {'; '.join(said)}."
        )
    return sentences


def _sentence(method: Method, found: Difference | None, moment: Moment) -> str:
    if found is None:
        return f"{method.name} has no accuracy [{method.trouble() or 'no validation images'}]"
    return f"{method.name} is {points_text(found)} ({_percent(method, moment)}){interval_text(found)}"


def _rankings(table: FederatedComparison, rows: Sequence[Method]) -> list[str]:
    """Say where the last round and the one chosen by validation disagree on the best method."""
    best = []
    for moment in table.moments:
        ranked = [(mean, method.name) for method in rows if (mean := method.score(moment=moment).mean) is not None]
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
