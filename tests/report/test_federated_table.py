"""Methods by domains: what is put together, what is told apart, and what is said of it."""

import io
import math
import statistics

import pytest
from federated_folders import DOMAINS, write_federated_run, write_federation_study

from batchless.report import claims, compare_runs, comparison, federated_claims, federated_comparison
from batchless.report.difference import difference
from batchless.report.federated_contents import choose_method
from batchless.report.federated_curves import SHARE, convergence, curve
from batchless.runs import read_run


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_federation_study(tmp_path_factory.mktemp("federation"))


def made(folder, *names, **more):
    """One run per `(algorithm, normalizer, seed, config)`."""
    runs = []
    for place, (algorithm, normalizer, seed, config) in enumerate(names):
        path = write_federated_run(
            folder / str(place), algorithm, normalizer, seed=seed, config=config, rounds=4, **more
        )
        runs.append(read_run(path))
    return runs


def logged(run, round_, domain, key="accuracy"):
    (found,) = [
        record[key]
        for record in run.metrics
        if record["kind"] == "test" and (record["round"], record["domain"]) == (round_, domain)
    ]
    return found


def test_a_cell_is_the_mean_over_seeds_of_what_was_logged_in_that_round(study):
    table = federated_comparison(study)
    assert table.domains == DOMAINS
    assert [method.name for method in table.methods] == ["fedavg (bn)", "fedbn (bn)", "fedwon (none+sws)"]
    for method, runs in zip(table.methods, (study[:3], study[3:6], study[6:]), strict=True):
        for moment in ("last", "chosen"):
            rounds = [20 if moment == "last" else run.summary["chosen_round"] for run in runs]
            for column in table.columns:
                score = method.score(column, moment=moment)
                expected = [logged(run, round_, column) for run, round_ in zip(runs, rounds, strict=True)]
                assert score.accuracies == pytest.approx(expected)
                assert score.mean == pytest.approx(statistics.fmean(expected))
                assert score.sd == pytest.approx(statistics.stdev(expected))
                assert score.seeds == (0, 1, 2)
    assert not table.warnings


def test_runs_without_validation_have_the_last_round_alone(tmp_path):
    table = federated_comparison(made(tmp_path, ("fedavg", "bn", 0, {}), validates=False))
    assert table.moments == ("last",)
    assert "chosen" not in table.markdown()


def test_methods_are_told_apart_by_what_varies_between_runs_of_the_same_two(tmp_path):
    runs = made(
        tmp_path,
        ("fedwon", "none+sws", 0, {"images_per_step": 1}),
        ("fedwon", "none+sws", 0, {"images_per_step": 2}),
        ("fedwon", "none+sws", 1, {"images_per_step": 2}),
        ("fedavg", "gn", 0, {"images_per_step": 2}),
        ("fedavg", "bn", 0, {"images_per_step": 2, "optimizer": {"lr": 0.1}, "workers": 2}),
        ("fedavg", "bn", 1, {"images_per_step": 2, "optimizer": {"lr": 0.1}, "workers": 1}),
    )
    table = federated_comparison(runs)
    assert {method.name: method.score().n for method in table.methods} == {
        "fedwon (none+sws, images_per_step=1)": 1,
        "fedwon (none+sws, images_per_step=2)": 2,
        "fedavg (gn, images_per_step=2)": 1,
        "fedavg (bn, images_per_step=2)": 2,
    }
    assert "not like for like: images_per_step is 1 (1 run), 2 (5 runs)" in table.warnings
    assert "not like for like: optimizer.lr is 0.01 (4 runs), 0.1 (2 runs)" in table.warnings
    assert not any("workers" in warning or "algorithm" in warning for warning in table.warnings)


def test_an_algorithms_own_settings_are_what_is_compared(tmp_path):
    runs = made(tmp_path, ("fedavg", "bn", 0, {}), ("fedprox", "bn", 0, {}), ("fedprox", "bn", 0, {"mu": 0.1}))
    table = federated_comparison(runs)
    assert [method.name for method in table.methods] == ["fedavg (bn)", "fedprox (bn, mu=0.01)", "fedprox (bn, mu=0.1)"]
    assert not table.warnings


@pytest.mark.parametrize(("seeds", "warns"), [((0, 1, 0, 1), False), ((0, 1, 2, 3), True)])
def test_partition_seeds_are_alike_where_all_methods_have_the_same(tmp_path, seeds, warns):
    names = [("fedavg", "bn", 0), ("fedavg", "bn", 1), ("fedbn", "bn", 0), ("fedbn", "bn", 1)]
    runs = made(tmp_path, *((*name, {"data": {"seed": seed}}) for name, seed in zip(names, seeds, strict=True)))
    table = federated_comparison(runs)
    assert [method.score().n for method in table.methods] == [2, 2]
    assert any("data.seed" in warning for warning in table.warnings) == warns


def test_a_seed_counted_twice_is_named(tmp_path):
    table = federated_comparison(made(tmp_path, ("fedavg", "bn", 0, {}), ("fedavg", "bn", 0, {})))
    assert table.warnings == ("not independent: fedavg (bn) has seed 0 2 times; its n and sd mislead",)


def test_failed_and_unfinished_runs_are_told(tmp_path):
    runs = made(tmp_path / "a", ("fedavg", "bn", 0, {}))
    runs += made(tmp_path / "b", ("fedavg", "bn", 1, {}), failed="1 client of 4 is left")
    (tmp_path / "c").mkdir()
    unfinished = made(tmp_path / "c", ("fedavg", "bn", 2, {}))[0].path
    (unfinished / "summary.json").unlink()
    (method,) = federated_comparison([*runs, read_run(unfinished)]).methods
    assert method.trouble() == "1 of 3 failed: 1 client of 4 is left; 1 of 3 not finished"
    assert method.score().n == 1


def test_a_domain_without_clients_is_marked_and_not_part_of_the_mean(tmp_path):
    config = {"data": {"unseen_domains": ["webcam"]}}
    table = federated_comparison(made(tmp_path, ("fedwon", "none+sws", 0, config)))
    (method,) = table.methods
    assert method.unseen() == ("webcam",)
    assert "(unseen) |" in table.markdown()


@pytest.mark.parametrize("algorithm", [None, 3])
def test_a_run_without_an_algorithm_is_refused(tmp_path, algorithm):
    with pytest.raises(ValueError, match=r"config\.yaml: algorithm is (None|3); its name is needed"):
        federated_comparison(made(tmp_path, ("fedavg", "bn", 0, {"algorithm": algorithm})))


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="no runs to compare"):
        federated_comparison([])
    with pytest.raises(ValueError, match="no runs to compare"):
        compare_runs([])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(None, "fedavg (bn)"), ("fedbn", "fedbn (bn)"), ("fedwon (none+sws)", "fedwon (none+sws)")],
)
def test_the_control(study, wanted, expected):
    assert choose_method(federated_comparison(study), wanted).name == expected


def test_the_control_is_plain_fedavg_wherever_it_stands(tmp_path):
    runs = made(tmp_path, ("fedavg", "gn", 0, {}), ("fedavg", "bn", 0, {}), ("fedbn", "bn", 0, {}))
    assert choose_method(federated_comparison(runs)).name == "fedavg (bn)"
    assert choose_method(federated_comparison(runs[:1] + runs[2:])).name == "fedavg (gn)"


def test_an_unknown_control_is_refused(study):
    with pytest.raises(ValueError, match=r"control is 'fedsgd', which was not run; give one of fedavg \(bn\); fedbn"):
        choose_method(federated_comparison(study), "fedsgd")


def test_findings_say_what_the_intervals_allow(study):
    table = federated_comparison(study)
    first, second, third = federated_claims(table)
    found = difference(table.methods[2].score(), table.methods[0].score())
    low, high = (100 * end for end in found.interval)
    assert f"fedwon (none+sws) is {100 * found.value:.1f} points above" in first
    assert f"95 % interval {low:+.1f} to {high:+.1f}" in first
    assert "at the last round, against fedavg (bn)" in first
    assert "at the round chosen by validation" in second
    assert third.endswith("fedbn (bn) once.")
    assert "points below" in federated_claims(table, control="fedwon")[0]


def test_one_seed_is_no_proof_and_one_method_no_comparison(tmp_path):
    runs = made(tmp_path, ("fedavg", "bn", 0, {}), ("fedbn", "bn", 0, {}))
    said = federated_claims(federated_comparison(runs))
    assert "interval" not in said[0]
    assert said[-1].startswith("Every accuracy here is from one seed, and one seed is no proof")
    assert federated_claims(federated_comparison(runs[:1]))[0].startswith("One method is no comparison")


def test_what_both_kinds_of_runs_say_is_said_once(tmp_path, make_runs):
    runs = [*make_runs({"bn": {1: [0.5], 32: [0.6]}}), *made(tmp_path, ("fedavg", "bn", 0, {}), ("fedbn", "bn", 0, {}))]
    both = compare_runs(runs)
    ordinary, federated = claims(both.trained), federated_claims(both.federated)
    assert ordinary[-1] == federated[-1]
    assert both.findings() == ordinary[:-1] + federated


def test_a_difference_within_its_spread_is_called_that(tmp_path):
    runs = [
        read_run(write_federated_run(tmp_path / f"{name}{seed}", name, "bn", seed=seed, accuracy=accuracy, rounds=4))
        for name, accuracies in (("fedavg", (0.5, 0.7)), ("fedbn", (0.72, 0.51)))
        for seed, accuracy in enumerate(accuracies)
    ]
    assert "which its spread over seeds may explain" in federated_claims(federated_comparison(runs))[0]


def test_curves_carry_rounds_images_and_bytes_and_a_resumed_round_counts_once(study):
    run = study[0]
    points = curve(run)
    assert [point.rounds for point in points] == list(range(1, 21))
    assert points[4].percent == 100 * logged(run, 5, "mean")
    assert (points[4].images, points[4].bytes) == (5 * 248, 8 * 56_876_840 * 5)
    again = [record for record in run.metrics if record.get("round") == 20]
    doubled = type(run)(
        path=run.path,
        config=run.config,
        environment=run.environment,
        summary=run.summary,
        metrics=(*run.metrics, *again),
    )
    assert curve(doubled) == points


def test_convergence_is_the_first_test_at_the_level(study):
    table = federated_comparison(study)
    level = 100 * SHARE * table.methods[0].score().mean
    for one, method in zip(convergence(table.methods, percent=level), table.methods, strict=True):
        firsts = [min(r for r in range(1, 21) if 100 * logged(run, r, "mean") >= level) for run in method.runs]
        assert one.average("rounds") == statistics.fmean(firsts)
        assert one.average("images") == pytest.approx(248 * statistics.fmean(firsts))
    (never,) = convergence(table.methods[:1], percent=math.inf)
    assert never.reached == ()
    assert never.average("rounds") is None


def test_the_terminal_table_names_every_method_and_column(study):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(compare_runs(study).rich(title="Test accuracy"))
    text = console.export_text()
    for word in (*DOMAINS, "mean at the", "fedwon (none+sws)", "Test accuracy"):
        assert word in text


def test_runs_of_both_kinds_are_compared_each_among_themselves(study, make_runs):
    ordinary = make_runs({"bn": {1: [0.5, 0.5], 2: [0.5, 0.52]}})
    both = compare_runs([*ordinary, *study])
    assert both.trained == comparison(ordinary)
    assert both.federated == federated_comparison(study)
    assert both.findings()[-3:] == federated_claims(both.federated)
    assert "images per forward" in both.markdown()
    assert "fedbn (bn)" in both.markdown()
    assert compare_runs(study).trained is None
    assert compare_runs(ordinary).federated is None
