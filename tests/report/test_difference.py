"""Intervals against scipy's own tests, and against a formula written out."""

import math
import statistics

import pytest
from scipy import stats

from batchless.report import comparison
from batchless.report.difference import choose_control, difference

ONE, OTHER = [0.61, 0.64, 0.60, 0.66], [0.55, 0.56, 0.58, 0.57]


def cells(make_run, one, other, *, seeds=None, other_seeds=None):
    runs = [
        make_run("gn", 2, accuracy, seed=seed) for seed, accuracy in zip(seeds or range(len(one)), one, strict=True)
    ]
    runs += [
        make_run("bn", 2, accuracy, seed=seed)
        for seed, accuracy in zip(other_seeds or range(len(other)), other, strict=True)
    ]
    table = comparison(runs)
    return table.cell("gn", 2), table.cell("bn", 2)


def test_the_same_seeds_are_paired(make_run):
    found = difference(*cells(make_run, ONE, OTHER))
    expected = stats.ttest_rel(ONE, OTHER).confidence_interval(0.95)
    assert found.value == pytest.approx(statistics.fmean(ONE) - statistics.fmean(OTHER))
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.how == "paired by seed"


def test_paired_by_the_seed_not_by_the_order(make_run):
    found = difference(*cells(make_run, ONE, OTHER[::-1], other_seeds=[3, 2, 1, 0]))
    assert found.interval == pytest.approx(difference(*cells(make_run, ONE, OTHER)).interval)


def test_a_paired_interval_by_hand(make_run):
    """Differences 1, 2, 3 points: mean 2, sd 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653."""
    found = difference(*cells(make_run, [0.51, 0.52, 0.53], [0.50, 0.50, 0.50]))
    half = 4.302653 / math.sqrt(3)
    assert [100 * end for end in found.interval] == pytest.approx([2 - half, 2 + half], abs=1e-5)


@pytest.mark.parametrize("other_seeds", [[4, 5, 6, 7], [0, 1, 2, 9], [0, 0, 1, 2], ["a", "b", "c", "d"]])
def test_other_or_repeated_seeds_are_not_paired(make_run, other_seeds):
    found = difference(*cells(make_run, ONE, OTHER, other_seeds=other_seeds))
    expected = stats.ttest_ind(ONE, OTHER, equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.how == "Welch"


def test_unequal_numbers_of_seeds(make_run):
    found = difference(*cells(make_run, ONE, OTHER[:2]))
    expected = stats.ttest_ind(ONE, OTHER[:2], equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("one", "other"), [([0.6], [0.5]), ([0.6, 0.7], [0.5]), ([0.6], [0.5, 0.4])])
def test_one_seed_has_no_interval(make_run, one, other):
    found = difference(*cells(make_run, one, other))
    assert found.value == pytest.approx(statistics.fmean(one) - statistics.fmean(other))
    assert found.interval is None
    assert found.how == "none: one seed"


@pytest.mark.parametrize("other_seeds", [None, [7, 8, 9]])
def test_seeds_that_change_nothing_have_no_interval(make_run, other_seeds):
    found = difference(*cells(make_run, [0.6] * 3, [0.5] * 3, other_seeds=other_seeds))
    assert (found.interval, found.how) == (None, "none: no spread")


def test_rounding_is_no_spread(make_run):
    assert difference(*cells(make_run, [0.31, 0.51, 0.71], [0.3, 0.5, 0.7])).interval is None


def test_no_accuracy_no_difference(make_run):
    assert difference(*cells(make_run, ["failed"], [0.5])) is None
    assert difference(*cells(make_run, [0.5], [None])) is None


def test_the_control_is_bn_at_its_largest_batch_else_the_first(make_runs):
    assert choose_control(comparison(make_runs({"gn": {2: 0.5, 64: 0.5}, "bn": {2: 0.5, 8: 0.5}}))) == (
        comparison(make_runs({"bn": {8: 0.5}})).cell("bn", 8)
    )
    first = choose_control(comparison(make_runs({"gn": {2: 0.5, 64: 0.5}, "in": {2: 0.5}})))
    assert (first.normalizer, first.images_per_forward) == ("gn", 64)


def test_another_control_can_be_named(make_runs):
    table = comparison(make_runs({"bn": {2: 0.5, 64: 0.5}, "gn+ws": {1: 0.5, 2: 0.5}}))
    for wanted, expected in (("gn+ws", ("gn+ws", 2)), ("gn+ws@1", ("gn+ws", 1)), ("bn@2", ("bn", 2))):
        found = choose_control(table, wanted)
        assert (found.normalizer, found.images_per_forward) == expected


@pytest.mark.parametrize("wanted", ["in", "bn@3", "bn@", "@", "gn+ws@two"])
def test_a_control_that_was_not_run(make_runs, wanted):
    table = comparison(make_runs({"bn": {2: 0.5, 64: 0.5}, "gn+ws": {1: 0.5}}))
    with pytest.raises(ValueError, match=r"control is '.*', which was not run; give a normalizer, or one of .*@"):
        choose_control(table, wanted)
