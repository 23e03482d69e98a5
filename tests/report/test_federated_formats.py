"""The page, Markdown and JSON of federated runs say the same, and charts are what plotly takes."""

import json

import pytest
from federated_folders import CLASSES, DOMAINS, record, write_federated_run, write_federation_study
from report_folders import write_study
from test_charts import check
from test_formats import SAID, strict
from test_page import HOSTILE, Page, figures

from batchless.report import compare_runs, federated_comparison, render_json, render_markdown, write_page
from batchless.report.difference import difference
from batchless.report.federated_charts import curve_charts, domains_chart, partition_chart
from batchless.report.federated_partition import MOST, read_partitions
from batchless.report.page import render_page
from batchless.report.style import styles
from batchless.runs import read_run


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("federation")
    failed = write_federated_run(root / "prox", "fedprox", "bn", failed="client 2: loss is not finite")
    return [*write_federation_study(root), read_run(failed)]


@pytest.fixture(scope="module")
def text(study):
    return render_page(study, **SAID)


@pytest.fixture(scope="module")
def both(tmp_path_factory, study):
    return [*write_study(tmp_path_factory.mktemp("study"), seeds=2), *study]


def test_json_holds_the_numbers_unrounded(study):
    told = strict(render_json(study, **SAID))
    table = federated_comparison(study)
    assert (told["title"], told["control"], told["domains"]) == ("A title", "fedavg (bn)", list(DOMAINS))
    for said, method in zip(told["methods"], table.methods, strict=True):
        assert said["name"] == method.name
        for moment in table.moments:
            for column in table.columns:
                score = method.score(column, moment=moment)
                cell = said["accuracy"][moment][column]
                assert (cell["mean"], cell["sd"], cell["n"]) == (score.mean, score.sd, score.n)
                found = difference(score, table.methods[0].score(column, moment=moment))
                if method is table.methods[0] or found is None:
                    assert cell["difference"] is None
                else:
                    assert cell["difference"]["interval"] == list(found.interval)
    assert [method["clients_left_out"] for method in told["methods"]] == [0, 1, 0, 0]
    assert told["methods"][0]["bytes"] == 8 * 56_876_840 * 20
    assert told["methods"][3]["failures"] == ["client 2: loss is not finite"]
    assert told["privacy"] == []
    assert told["left_out"] == [
        {
            "method": "fedbn (bn)",
            "seed": "0",
            "client": "1",
            "reason": "its update holds what is no number",
            "rounds": ["3"],
        }
    ]
    assert told["partitions"][0]["holders"][3] == {"id": 3, "domain": "webcam", "counts": [6] * 10, "validation": 10}
    assert told["conversions"][0]["normalizer"] == "bn"


def test_markdown_has_a_row_per_method_in_every_table(study):
    told = render_markdown(study, **SAID, control="fedbn")
    assert "The control is fedbn (bn)." in told
    blocks = [block for block in told.split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert sum(block.count("fedprox (bn)") for block in blocks) >= 4
    assert "| fedbn (bn) | 0 | 1 | its update holds what is no number | 3 |" in told
    assert "| amazon | 1 | 60 | 10 | 10 | 59 |" in told
    assert "batchless federate --config" in told


def test_the_page_holds_tables_reasons_and_the_commands(text, study):
    seen = Page(text)
    table = federated_comparison(study)
    for method in table.methods[:3]:
        for column in DOMAINS:
            score = method.score(column)
            assert f"{100 * score.mean:.1f} sd {100 * score.sd:.1f}" in seen.text
        assert f"{100 * method.score().mean:.1f} sd {100 * method.score().sd:.1f} · n = 3" in seen.text
    assert seen.text.count("failed: client 2: loss is not finite") >= 3
    assert "The control is fedavg (bn) ." in seen.text
    assert "make demo" in seen.words
    assert "batchless federate --config" in seen.text
    assert "weight 16 57044810 averaged" in seen.text
    assert "Batch normalization takes its statistics" not in seen.text
    assert "9.1 GB" in seen.text


def test_every_figure_has_its_place_and_is_taken_by_plotly(text):
    seen = Page(text)
    assert set(figures(text)) == {"domains", *(f"curve-{i}" for i in range(5)), "partition-0"}
    for name, figure in figures(text).items():
        assert ("id", name) in seen.attributes
        check({"data": figure["data"], "layout": figure["layout"]})
        for other in figure.get("across", {}).values():
            check({"data": [], "layout": {"xaxis": other["xaxis"]}})


def test_nothing_is_fetched_and_the_same_runs_give_the_same_page(text, study):
    names = {name for name, _ in Page(text).attributes}
    assert not {"src", "href", "style"} & names
    assert text == render_page(study, **SAID)


def test_the_accuracy_chart_shows_means_and_spread_at_the_last_round(study):
    table = federated_comparison(study)
    chart = domains_chart(table, styles([method.name for method in table.methods]))
    assert [trace["name"] for trace in chart["data"]] == ["fedavg (bn)", "fedbn (bn)", "fedwon (none+sws)"]
    for trace, method in zip(chart["data"], table.methods, strict=False):
        assert trace["y"] == [100 * method.score(column).mean for column in table.columns]
        assert trace["error_y"]["array"] == [100 * method.score(column).sd for column in table.columns]
        assert [round(x) for x in trace["x"]] == list(range(5))


def test_curves_may_be_read_per_round_image_and_byte(study):
    table = federated_comparison(study)
    charts = curve_charts(table, styles([method.name for method in table.methods]))
    assert list(charts) == ["mean", *DOMAINS]
    for chart in charts.values():
        assert len(chart["data"]) == len(study)
        assert list(chart["across"]) == ["rounds", "images", "bytes"]
        assert chart["data"][0]["x"] == chart["across"]["rounds"]["x"][0] == list(range(1, 21))
        assert chart["across"]["images"]["x"][0] == [248 * r for r in range(1, 21)]
        assert all(len(other["x"]) == len(study) for other in chart["across"].values())


def test_where_nothing_is_sent_there_is_no_axis_of_bytes(tmp_path):
    runs = [read_run(write_federated_run(tmp_path / "c", "centralized", "bn"))]
    table = federated_comparison(runs)
    charts = curve_charts(table, styles([method.name for method in table.methods]))
    assert list(charts["mean"]["across"]) == ["rounds", "images"]


def test_the_partition_is_drawn_by_client_and_class(tmp_path):
    held = record(clients_per_domain=3, alpha=0.1, seed=4)
    run = read_run(write_federated_run(tmp_path / "run", partition=held))
    (partition,), notes = read_partitions([run])
    assert notes == []
    chart = partition_chart(partition)
    check(chart)
    (trace,) = chart["data"]
    assert trace["z"] == [client["counts"] for client in held["clients"]]
    assert trace["zmax"] == max(map(max, trace["z"]))
    assert chart["layout"]["xaxis"]["ticktext"] == list(CLASSES)
    assert chart["layout"]["yaxis"]["tickvals"] == [1, 4, 7, 10]
    assert trace["text"][5][2].startswith("client 5, caltech<br>")
    assert partition.title == "dirichlet(alpha=0.1, minimum=1), seed 4"


def test_one_partition_is_shown_for_all_its_seeds_and_not_more_than_a_few(tmp_path):
    def run(name, **settings):
        held = record(clients_per_domain=2, **settings)
        config = {"data": {"alpha": settings.get("alpha"), "seed": settings["seed"]}}
        return read_run(write_federated_run(tmp_path / name, partition=held, config=config, rounds=2))

    same = [run(f"a{seed}", alpha=0.5, seed=seed) for seed in range(3)]
    (partition,), _ = read_partitions(same)
    assert partition.seeds == ("0", "1", "2")
    assert "2 other seeds" in partition.title
    others = [run(f"b{alpha}", alpha=float(alpha), seed=0) for alpha in range(1, 6)]
    partitions, notes = read_partitions(same + others)
    assert len(partitions) == MOST
    assert notes == [f"partitions are shown for {MOST} of 6 rules; the others are left out"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is damaged"),
        ("[1]", "is not as batchless writes it"),
        ("{}", "is not as batchless writes it"),
        (json.dumps(record() | {"classes": ["one"]}), "is not as batchless writes it"),
        (json.dumps(record() | {"clients": []}), "is not as batchless writes it"),
    ],
)
def test_a_damaged_partition_is_a_note_that_names_the_file(tmp_path, content, told):
    folder = write_federated_run(tmp_path / "run", rounds=2)
    (folder / "partition.json").write_text(content)
    partitions, (note,) = read_partitions([read_run(folder)])
    assert partitions == []
    assert told in note
    assert "partition.json" in note
    (folder / "partition.json").unlink()
    assert "1 of 1 federated run folders have no partition.json" in read_partitions([read_run(folder)])[1][0]


def test_a_domain_without_clients_is_told(tmp_path):
    held = record(unseen=("webcam",))
    config = {"data": {"unseen_domains": ["webcam"]}}
    run = read_run(write_federated_run(tmp_path / "run", partition=held, config=config))
    seen = Page(render_page([run], **SAID)).text
    assert "webcam 0 (unseen) 0 59" in seen
    assert "unseen" in seen[: seen.index("Partition")]


def test_runs_that_say_little_still_make_a_page(tmp_path):
    folder = write_federated_run(tmp_path / "run", failed="it is over")
    for name in ("partition.json", "conversion.json", "sharing.txt", "metrics.jsonl"):
        (folder / name).unlink()
    seen = Page(render_page([read_run(folder)], **SAID)).text
    assert "No run has come to a test accuracy." in seen
    assert "Learning curves" not in seen
    assert "which has no accuracy" in seen
    render_json([read_run(folder)], **SAID)
    assert "it is over" in render_markdown([read_run(folder)], **SAID)


def test_both_kinds_are_two_halves_of_one_report(both, study):
    text = render_page(both, **SAID)
    seen = Page(text).text
    assert seen.index("Few images per forward") < seen.index("Test accuracy by domain")
    assert seen.count("The control is") == 2
    drawn = figures(text)
    assert {"accuracy", "learning-1", "domains", "curve-0", "partition-0"} <= set(drawn)
    series = [{trace.get("meta") for trace in drawn[name]["data"]} for name in ("accuracy", "domains")]
    assert not series[0] & series[1]  # a legend hides what belongs to it, and nothing of the other half
    told = strict(render_json(both, **SAID))
    assert told["trained"]["control"] == {"normalizer": "bn", "images_per_forward": 64}
    assert told["federated"]["control"] == "fedavg (bn)"
    assert "## Test accuracy by method and domain" in render_markdown(both, **SAID)


@pytest.mark.parametrize(
    ("control", "said"), [("gn+ws@2", ["gn+ws at 2 ", "fedavg (bn)"]), ("fedbn", ["bn at 64 ", "fedbn (bn)"])]
)
def test_a_control_is_for_the_half_that_has_it(both, control, said):
    text = render_markdown(both, **SAID, control=control)
    assert [f"The control is {name}" in text for name in said] == [True, True]
    findings = compare_runs(both).findings(control=control)
    assert any(f"against {said[1]}" in finding for finding in findings)


def test_a_control_that_neither_half_has_is_refused(both):
    with pytest.raises(
        ValueError, match=r"control is 'ln', which was not run.*; of the federated runs: control is 'ln'"
    ):
        render_json(both, **SAID, control="ln")


def test_hostile_names_are_text_everywhere(tmp_path):
    held = record() | {"classes": [HOSTILE] * 10, "partitioner": {"name": HOSTILE, HOSTILE: HOSTILE}}
    folder = write_federated_run(
        tmp_path / "run", HOSTILE, HOSTILE, config={"model": HOSTILE}, partition=held, left_out=1
    )
    (folder / "sharing.txt").write_text(HOSTILE)
    lines = (folder / "metrics.jsonl").read_text().replace("webcam", json.dumps(HOSTILE)[1:-1])
    (folder / "metrics.jsonl").write_text(lines)
    runs = [read_run(folder), read_run(write_federated_run(tmp_path / "other", failed=HOSTILE))]
    text = render_page(runs, title=HOSTILE, findings=compare_runs(runs).findings(), commands=[HOSTILE])
    seen = Page(text)
    assert seen.elements.count("script") == text.lower().count("<script") == 3
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert HOSTILE in seen.text
    for figure in figures(text).values():
        assert "<script" not in json.dumps(figure["data"]) + json.dumps(figure["layout"])
    told = render_markdown(runs, title=HOSTILE, findings=[], commands=[])
    assert "<script" not in told.partition("## Commands")[0]
    strict(render_json(runs, title=HOSTILE, findings=[], commands=[]))


def test_the_page_is_written(tmp_path, study):
    write_page(tmp_path / "new" / "report.html", study, **SAID)
    assert (tmp_path / "new" / "report.html").read_text("utf-8").startswith("<!doctype html>")


def test_what_privacy_cost_is_in_every_format(tmp_path):
    settings = {"level": "client", "clip_norm": 0.5, "noise_multiplier": 1.5, "delta": 1e-3}
    folders = [write_federated_run(tmp_path / "plain", config={"privacy": {**settings, "level": "none"}})]
    folders.append(write_federated_run(tmp_path / "private", config={"privacy": settings}, epsilon=4.25))
    runs = [read_run(folder) for folder in folders]
    (row,) = strict(render_json(runs, **SAID))["privacy"]
    assert row["method"] == "fedavg (bn, privacy.level=client)"
    assert list(row.values())[1:] == ["0", "clients", "0.5", "1.5", "4.25", "0.001"]
    markdown = render_markdown(runs, **SAID)
    assert "## Differential privacy" in markdown
    assert "| clients | 0.5 | 1.5 | 4.25 | 0.001 |" in markdown
    assert "of the networks only, not of the figures on this page" in render_page(runs, **SAID)
