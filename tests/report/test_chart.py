import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchless.report import comparison
from batchless.report.chart import COLOURS, Axis, Line, Point, draw, style, ticks
from batchless.report.figures import POINTS, accuracy_chart, learning_charts

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
AXIS = Axis(label="", low=0.0, high=10.0, ticks=((0.0, "0"), (10.0, "10")))


@given(NUMBERS, NUMBERS, st.integers(2, 8))
def test_ticks_are_few_round_and_enclose(one, other, count):
    low, high = sorted((one, other))
    found = ticks(low, high, count=count)
    tolerance = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + tolerance
    assert found[-1] >= high - tolerance
    assert 2 <= len(found) <= count + 3
    steps = [after - before for before, after in pairwise(found)]
    assert max(steps) - min(steps) <= 1e-6 * max(1.0, abs(low), abs(high))


def test_ticks_of_one_value():
    assert len(ticks(0.0, 0.0)) == len(ticks(70.0, 70.0)) == 2


def test_no_two_of_many_series_look_alike_and_none_differ_by_colour_alone():
    looks = [style(index) for index in range(COLOURS * 5)]
    assert len({(look.dash, look.marker) for look in looks[:35]}) == 35
    assert len(set(looks)) == len(looks)


def test_everything_is_drawn_inside_the_box_even_values_beyond_the_axis():
    points = tuple(Point(x=x, y=y, spread=3.0, title="t") for x, y in ((0.0, -5.0), (5.0, 5.0), (10.0, 1e9)))
    lines = [Line(style=style(index), points=points, absent=(Point(x=10.0, y=0.0, title="t"),)) for index in range(4)]
    chart = draw(lines, label="", x=AXIS, y=AXIS, width=400, height=300, text=12, dodge=6.0)
    for line in chart.lines:
        for mark in (*line.marks, *line.absent):
            assert chart.left < mark.x < chart.right
            assert chart.top <= mark.high <= mark.y <= mark.low <= chart.bottom


def test_higher_is_further_up_and_more_is_further_right():
    line = Line(style=style(0), points=tuple(Point(x=v, y=v, title="t") for v in (0.0, 2.0, 10.0)))
    low, middle, high = draw([line], label="", x=AXIS, y=AXIS, width=400, height=300, text=12).lines[0].marks
    assert low.x < middle.x < high.x
    assert low.y > middle.y > high.y


def test_points_at_the_same_place_are_dodged_by_the_same_amount():
    lines = [Line(style=style(index), points=(Point(x=5.0, y=5.0, title="t"),)) for index in range(3)]
    chart = draw(lines, label="", x=AXIS, y=AXIS, width=400, height=300, text=12, dodge=6.0)
    first, middle, last = (line.marks[0].x for line in chart.lines)
    assert last - middle == pytest.approx(6.0)
    assert middle - first == pytest.approx(6.0)


def test_accuracy_chart_has_every_mean_its_spread_and_every_failure(make_runs):
    runs = make_runs({"bn": {1: "bad", 2: [0.5, 0.6], 32: [0.7, 0.71]}, "gn": {1: 0.65, 32: None}})
    bn, gn = accuracy_chart(comparison(runs)).lines
    assert [mark.title for mark in bn.marks] == [
        "bn, images per forward 2: 55.0 +- 7.1 (n=2)",
        "bn, images per forward 32: 70.5 +- 0.7 (n=2)",
    ]
    assert bn.marks[0].low > bn.marks[0].y > bn.marks[0].high
    assert [mark.title for mark in bn.absent] == ["bn, images per forward 1: failed: bad"]
    assert gn.marks[0].low == gn.marks[0].high
    assert [mark.title for mark in gn.absent] == ["gn, images per forward 32: not finished"]


def test_small_differences_are_not_made_large(make_runs):
    chart = accuracy_chart(comparison(make_runs({"bn": {2: 0.700, 32: 0.701}})))
    values = [float(text) for _, text in chart.y_ticks]
    assert max(values) - min(values) >= 10


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(2,), (1, 2, 3, 30, 32)])
def test_extreme_accuracies_and_sizes_have_a_chart(make_runs, accuracy, sizes):
    chart = accuracy_chart(comparison(make_runs({"bn": dict.fromkeys(sizes, accuracy)})))
    assert all(0 <= float(text) <= 100 for _, text in chart.y_ticks)
    assert len(chart.x_ticks) == len(sizes)
    assert all(math.isfinite(mark.x) and math.isfinite(mark.y) for mark in chart.lines[0].marks)


def test_no_accuracy_at_all_has_no_chart(make_run):
    assert accuracy_chart(comparison([make_run("bn", 1, "bad")])) is None


def curve(kind, name, values):
    return [{"kind": kind, "images": 10 * (i + 1), name: value} for i, value in enumerate(values)]


def test_learning_curves_prefer_the_test_accuracy(make_run):
    log = curve("train", "loss", [2.0, 1.0]) + curve("test", "accuracy", [0.1, 0.25])
    runs = [make_run("bn", 2, 0.25, curve=log), make_run("gn", 32, 0.25, curve=log, seed=3)]
    what, charts = learning_charts(comparison(runs), runs)
    assert what == "test accuracy"
    assert list(charts) == ["2 images per forward", "32 images per forward"]
    (line,) = charts["32 images per forward"].lines
    assert [mark.title for mark in line.marks] == ["gn, seed 3: 25 % after 20 images"]
    assert {chart.x_ticks for chart in charts.values()} == {charts["2 images per forward"].x_ticks}
    assert {chart.y_ticks for chart in charts.values()} == {charts["2 images per forward"].y_ticks}


def test_learning_curves_fall_back_to_the_training_loss_without_what_is_not_finite(make_run):
    log = curve("train", "loss", [2.0, "nan", 1.0, "inf", 0.5]) + curve("test", "accuracy", [0.25])
    runs = [make_run("bn", 1, 0.25, curve=log)]
    what, charts = learning_charts(comparison(runs), runs)
    assert what == "training loss"
    (line,) = charts["1 image per forward"].lines
    assert len(re.findall("[ML]", line.path)) == 3
    assert line.marks[0].title == "bn, seed 0: 0.5 after 50 images"


def test_a_run_that_diverges_does_not_flatten_the_others(make_run):
    runs = [
        make_run("bn", 1, "loss is inf", curve=curve("train", "loss", [2.0, 1e12])),
        make_run("gn", 1, 0.5, curve=curve("train", "loss", [2.0, 1.0])),
    ]
    _, charts = learning_charts(comparison(runs), runs)
    chart = charts["1 image per forward"]
    assert max(float(text) for _, text in chart.y_ticks) < 10
    assert chart.lines[0].marks[0].y == chart.top


def test_long_curves_are_thinned_and_keep_their_end(make_run):
    runs = [make_run("bn", 1, 0.5, curve=curve("train", "loss", [2.0 - i / 5000 for i in range(5000)]))]
    _, charts = learning_charts(comparison(runs), runs)
    (line,) = charts["1 image per forward"].lines
    assert POINTS / 2 < len(re.findall("[ML]", line.path)) <= POINTS
    assert line.marks[0].title.endswith("after 50,000 images")


def test_no_curves(make_run):
    runs = [make_run("bn", 1, 0.5, curve=curve("train", "loss", [2.0]))]
    assert learning_charts(comparison(runs), runs) == ("", {})
