import io
import statistics

import pytest
from rich.console import Console

from batchless.report import comparison


def printed(table, width=200):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_rows_as_first_seen_and_columns_ascending(make_runs):
    table = comparison(make_runs({"gn": {32: 0.5, 2: 0.5}, "bn": {8: 0.5}, "a": {2: 0.5}}))
    assert table.normalizers == ("gn", "bn", "a")
    assert table.sizes == (2, 8, 32)
    assert table.cell("gn", 8) is None
    assert table.cell("bn", 8).n == 1


def test_mean_sample_standard_deviation_and_n(make_runs):
    seeds = [0.7, 0.72, 0.77]
    cell = comparison(make_runs({"gn": {2: seeds}})).cell("gn", 2)
    assert cell.n == 3
    assert cell.mean == pytest.approx(0.73)
    assert cell.sd == pytest.approx(statistics.stdev(seeds))
    assert cell.text() == "73.0 +- 3.6 (n=3)"


def test_one_run_has_no_standard_deviation(make_run):
    cell = comparison([make_run("gn", 2, 0.7)]).cell("gn", 2)
    assert cell.sd is None
    assert cell.text() == "70.0 (n=1)"


def test_the_order_of_the_runs_of_a_cell_does_not_matter(make_runs):
    runs = make_runs({"gn": {2: [0.1, 0.5, 0.3]}})
    one, other = comparison(runs).cell("gn", 2), comparison(runs[::-1]).cell("gn", 2)
    assert (one.mean, one.sd, one.n) == (other.mean, other.sd, other.n)


def test_failed_and_unfinished_runs_are_neither_hidden_nor_averaged(make_runs):
    table = comparison(
        make_runs({"bn": {1: "one value per channel", 2: [0.4, "loss is nan", 0.6, None]}, "gn": {1: None}})
    )
    assert table.cell("bn", 1).mean is None
    assert table.cell("bn", 1).text() == "failed: one value per channel"
    assert table.cell("gn", 1).text() == "not finished"
    some = table.cell("bn", 2)
    assert (some.n, some.mean) == (2, 0.5)
    assert some.text() == "50.0 +- 14.1 (n=2); 1 of 4 failed: loss is nan; 1 of 4 not finished"


def test_an_accuracy_that_is_not_finite_is_a_failure(make_run):
    run = make_run("bn", 2, 0.5, test_accuracy="nan")
    assert comparison([run]).cell("bn", 2).text() == "failed: its test accuracy is nan"


def test_speed_is_the_mean_over_runs_that_ended(make_run):
    runs = [
        make_run("bn", 2, 0.5, images_per_second=speed, seed=seed) for seed, speed in enumerate((100.0, 300.0, "inf"))
    ]
    assert comparison([*runs, make_run("bn", 2, "nan loss", seed=9)]).cell("bn", 2).speed == 200.0


def test_like_runs_have_no_warnings(make_runs):
    runs = make_runs({"bn": {2: [0.1, 0.2], 32: [0.3, 0.4]}, "gn": {2: [0.1, "failed"]}})
    for index, run in enumerate(runs):
        run.config["out"] = f"runs/{index}"
    assert comparison(runs).warnings == ()


def test_other_differences_of_the_configuration_are_named(make_run):
    runs = [
        make_run("bn", 2, 0.5, config={"optimizer": {"name": "sgd", "lr": 0.1}}),
        make_run("gn", 2, 0.5, config={"optimizer": {"name": "sgd", "lr": 0.2}, "model": "resnet20"}),
        make_run("gn", 4, 0.5, config={"optimizer": {"name": "sgd", "lr": 0.2}, "warmup": 5}),
    ]
    table = comparison(runs)
    assert table.warnings == (
        "not like for like: model is resnet8 (2 runs), resnet20 (1 run)",
        "not like for like: optimizer.lr is 0.1 (1 run), 0.2 (2 runs)",
        "not like for like: warmup is not set (2 runs), 5 (1 run)",
    )
    assert table.shared == {"images_per_step": 32, "seed": 0, "optimizer.name": "sgd"}
    assert len(comparison(runs, ignore=("model", "warmup")).warnings) == 1


def test_another_budget_or_machine_is_named(make_run):
    runs = [make_run("bn", 2, 0.5), make_run("gn", 2, 0.5, images=2000, environment={"cpu": "Another CPU"})]
    assert comparison(runs).warnings == (
        "not like for like: the number of images seen is 1000 (1 run), 2000 (1 run)",
        "not like for like: the machine's cpu is A CPU (1 run), Another CPU (1 run)",
    )


def test_a_seed_counted_twice_is_named(make_run):
    runs = [make_run("bn", 2, 0.5), make_run("bn", 2, 0.5), make_run("bn", 4, 0.5)]
    (warning,) = comparison(runs).warnings
    assert warning.startswith("not independent: bn at 2 images per forward has seed 0 2 times")


def test_lists_and_numbers_of_another_type_compare_by_value(make_run):
    runs = [make_run("bn", 2, 0.5, config={"steps": [1, 2]}), make_run("gn", 2, 0.5, config={"steps": [1, 2]})]
    assert comparison(runs).shared["steps"] == [1, 2]
    assert comparison(runs).warnings == ()


def test_markdown_is_one_row_per_normalizer_and_keeps_its_shape(make_runs):
    text = comparison(make_runs({"gn": {2: [0.7, 0.72], 32: 0.8}, "a|b<i>\n*c*": {2: 0.5}})).markdown()
    assert text.splitlines() == [
        "| test accuracy, % / images per forward | 2 | 32 |",
        "| --- | ---: | ---: |",
        "| gn | 71.0 +- 1.4 (n=2) | 80.0 (n=1) |",
        r"| a\|b&lt;i> \*c\* | 50.0 (n=1) | - |",
    ]


def test_markdown_and_terminal_show_the_warnings(make_run):
    table = comparison([make_run("bn", 2, 0.5), make_run("gn", 2, 0.5, config={"model": "vgg"})])
    assert table.markdown().splitlines()[-1] == table.warnings[0]
    assert table.warnings[0] in " ".join(printed(table.rich()).split())


def test_terminal_table_takes_names_and_reasons_literally(make_runs):
    text = printed(comparison(make_runs({"[red]x[/red]": {1: "[bold]bad[/nothing]", 2: 0.25}})).rich(title="[b]t"))
    for part in ("[red]x[/red]", "failed: [bold]bad[/nothing]", "25.0 (n=1)", "[b]t"):
        assert part in text


def test_no_runs():
    with pytest.raises(ValueError, match="there are no runs to compare"):
        comparison([])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("normalizer", None, r"config\.yaml: normalizer is None"),
        ("normalizer", 3, r"config\.yaml: normalizer is 3"),
        ("images_per_forward", None, r"config\.yaml: images_per_forward is None"),
        ("images_per_forward", 0, r"config\.yaml: images_per_forward is 0; a whole number from 1"),
        ("images_per_forward", True, r"images_per_forward is True"),
        ("images_per_forward", 2.0, r"images_per_forward is 2\.0"),
    ],
)
def test_a_run_of_another_kind_is_named(make_run, key, value, message):
    with pytest.raises(ValueError, match=message):
        comparison([make_run("bn", 2, 0.5, config={key: value})])


def test_an_accuracy_in_percent_or_none_at_all_is_refused(make_run):
    with pytest.raises(ValueError, match=r"summary\.json: test_accuracy is 71\.5; it is a share from 0 to 1"):
        comparison([make_run("bn", 2, 71.5)])
    run = make_run("bn", 2, 0.5)
    del run.summary["test_accuracy"]
    with pytest.raises(ValueError, match=r"summary\.json has neither test_accuracy nor failed"):
        comparison([run])
