"""The charts are plotly's JSON: judged by plotly's own schema, and by the numbers in them."""

import json
import math
import re

import pytest
from plotly.graph_objects import Figure

from batchless.report import comparison
from batchless.report.charts import accuracy_chart, learning_charts
from batchless.report.curves import POINTS, learning_curves
from batchless.report.style import COLOURS, style, styles

HOSTILE = "</script><img src=x onerror=alert(1)>%{x}"


def accuracy(runs):
    table = comparison(runs)
    return accuracy_chart(table, styles(table.normalizers))


def learning(runs):
    table = comparison(runs)
    return learning_charts(learning_curves(runs), runs, table.sizes, styles(table.normalizers))


def traces(figure, mode):
    return [trace for trace in figure["data"] if trace["mode"] == mode]


def curve(kind, name, values):
    return [{"kind": kind, "images": 10 * (i + 1), name: value} for i, value in enumerate(values)]


def check(figure):
    """Raise unless plotly knows every property and takes every value, and JSON can hold them."""
    text = re.sub(r'"--\w+"', '"#123456"', json.dumps(figure, allow_nan=False))
    Figure(json.loads(text))


def test_no_two_of_many_series_look_alike_and_none_differ_by_colour_alone():
    looks = [style(index) for index in range(COLOURS * 5)]
    assert len({(look.dash, look.symbol) for look in looks[:35]}) == 35
    assert len({(look.dash_array, look.path) for look in looks[:35]}) == 35
    assert len({(look.colour, look.dash, look.symbol) for look in looks}) == len(looks)


def test_accuracy_chart_has_every_mean_its_spread_and_every_failure(make_runs):
    figure = accuracy(make_runs({"bn": {1: "bad", 2: [0.5, 0.6], 32: [0.7, 0.71]}, "gn": {1: 0.65, 32: None}}))
    check(figure)
    bn, gn = traces(figure, "lines+markers")
    assert bn["y"] == pytest.approx([55.0, 70.5])
    assert bn["error_y"]["array"] == pytest.approx([math.sqrt(50), math.sqrt(0.5)])
    assert bn["text"] == [
        "bn, 2 images per forward<br>55.0 ± 7.1 (n=2)",
        "bn, 32 images per forward<br>70.5 ± 0.7 (n=2)",
    ]
    assert "error_y" not in gn
    assert gn["text"] == ["gn, 1 image per forward<br>65.0 (n=1)"]
    crosses = traces(figure, "markers")
    assert [trace["text"] for trace in crosses] == [
        ["bn, 1 image per forward<br>failed: bad"],
        ["gn, 32 images per forward<br>not finished"],
    ]
    low, high = figure["layout"]["yaxis"]["range"]
    assert all(low < y < min(*bn["y"], *gn["y"]) for trace in crosses for y in trace["y"])
    assert high > 70.5 + math.sqrt(0.5)
    assert [trace["meta"] for trace in figure["data"]] == [0, 0, 1, 1]


def test_sizes_are_at_their_logarithm_and_series_a_little_apart(make_runs):
    figure = accuracy(make_runs({"bn": {1: [0.5, 0.6], 64: [0.5, 0.6]}, "gn": {1: [0.5, 0.6], 64: [0.5, 0.6]}}))
    bn, gn = figure["data"]
    assert [(a + b) / 2 for a, b in zip(bn["x"], gn["x"], strict=True)] == pytest.approx([0.0, 6.0])
    assert 0 < gn["x"][0] - bn["x"][0] < 0.5
    assert figure["layout"]["xaxis"]["tickvals"] == [0.0, 6.0]
    assert figure["layout"]["xaxis"]["ticktext"] == ["1", "64"]


def test_without_spread_nothing_is_moved_aside(make_runs):
    figure = accuracy(make_runs({"bn": {1: 0.5, 64: 0.6}, "gn": {1: 0.5, 64: 0.6}}))
    assert [trace["x"] for trace in figure["data"]] == [[0.0, 6.0], [0.0, 6.0]]


def test_small_differences_are_not_made_large(make_runs):
    low, high = accuracy(make_runs({"bn": {2: 0.700, 32: 0.701}}))["layout"]["yaxis"]["range"]
    assert high - low >= 10


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(2,), (1, 2, 3, 30, 32)])
def test_extreme_accuracies_and_sizes_are_inside_the_axes(make_runs, value, sizes):
    figure = accuracy(make_runs({"bn": dict.fromkeys(sizes, value)}))
    check(figure)
    for name, axis in (("x", "xaxis"), ("y", "yaxis")):
        low, high = figure["layout"][axis]["range"]
        assert all(low < found < high for found in figure["data"][0][name])
    assert len(figure["layout"]["xaxis"]["ticktext"]) == len(sizes)


def test_labels_that_would_run_into_each_other_are_left_out(make_runs):
    figure = accuracy(make_runs({"bn": dict.fromkeys((1, 2, 30, 32), 0.5)}))
    assert figure["layout"]["xaxis"]["ticktext"] == ["1", "2", "30", ""]


def test_no_accuracy_at_all_has_no_chart(make_run):
    assert accuracy([make_run("bn", 1, "bad")]) is None


def test_names_from_data_are_text_for_plotly_which_reads_tags_and_templates(make_run):
    runs = [make_run(HOSTILE, 1, HOSTILE), make_run(HOSTILE, 2, 0.5, curve=curve("test", "accuracy", [0.1, 0.2]))]
    figures = [accuracy(runs), *learning(runs).values()]
    for trace in (trace for figure in figures for trace in figure["data"]):
        texts = [trace["name"], *([trace["text"]] if isinstance(trace["text"], str) else trace["text"])]
        assert not re.search(r"<(?!br>)", "".join(texts))
        assert "%{x}" not in trace["hovertemplate"]  # a name there would be a template; in `text` it is text
        assert "&lt;/script&gt;" in texts[0]


def test_a_label_as_long_as_an_error_message_is_cut(make_run):
    (trace,) = traces(accuracy([make_run("bn", 1, "word " * 500), make_run("bn", 2, 0.5)]), "markers")
    assert len(trace["text"][0]) < 500
    assert trace["text"][0].endswith("...")


def test_learning_curves_prefer_the_test_accuracy(make_run):
    log = curve("train", "loss", [2.0, 1.0]) + curve("test", "accuracy", [0.1, 0.25])
    charts = learning([make_run("bn", 2, 0.25, curve=log), make_run("gn", 32, 0.25, curve=log, seed=3)])
    assert list(charts) == [2, 32]
    (trace,) = charts[32]["data"]
    check(charts[32])
    assert (trace["x"], trace["y"], trace["text"]) == ([10, 20], [10.0, 25.0], "gn, seed 3")
    assert trace["marker"]["size"] == [0, 8]
    assert trace["meta"] == 1
    for axis in ("xaxis", "yaxis"):
        assert charts[2]["layout"][axis] == charts[32]["layout"][axis]


def test_learning_curves_fall_back_to_the_training_loss_without_what_is_not_finite(make_run):
    log = curve("train", "loss", [2.0, "nan", 1.0, "inf", 0.5]) + curve("test", "accuracy", [0.25])
    runs = [make_run("bn", 1, 0.25, curve=log)]
    found = learning_curves(runs)
    assert (found.what, found.unit) == ("training loss", "")
    assert found.curves == (((10, 2.0), (30, 1.0), (50, 0.5)),)
    assert learning(runs)[1]["layout"]["yaxis"]["range"][0] == 0.0


def test_a_run_that_diverges_does_not_flatten_the_others(make_run):
    runs = [
        make_run("bn", 1, "loss is inf", curve=curve("train", "loss", [2.0, 1e12])),
        make_run("gn", 1, 0.5, curve=curve("train", "loss", [2.0, 1.0])),
    ]
    assert learning(runs)[1]["layout"]["yaxis"]["range"][1] < 10


def test_long_curves_are_thinned_and_keep_their_end(make_run):
    runs = [make_run("bn", 1, 0.5, curve=curve("train", "loss", [2.0 - i / 5000 for i in range(5000)]))]
    (points,) = learning_curves(runs).curves
    assert POINTS / 2 < len(points) <= POINTS
    assert points[-1][0] == 50_000


def test_no_curves(make_run):
    assert learning_curves([make_run("bn", 1, 0.5, curve=curve("train", "loss", [2.0]))]) is None
