"""Leave-one-domain-out: a method is one whatever it was trained without, and is compared over the same unseen domains."""

import statistics

import pytest
from federated_folders import DOMAINS, write_federated_run

from batchless.report import (
    compare_runs,
    federated_claims,
    federated_comparison,
    render_json,
    render_markdown,
    render_page,
)
from batchless.report.difference import difference
from batchless.report.federated_contents import gather_federated
from batchless.report.unseen_table import unseen_comparison
from batchless.runs import read_run

LEVELS = {("fedavg", "bn"): 0.6, ("fedwon", "none+sws"): 0.7}
SAID = {"title": "A title", "findings": [], "commands": ["a command"]}


def sweep(folder, *, left_out=DOMAINS, seeds=(0, 1, 2), methods=LEVELS, seen=False):
    """Each method without each domain; `seen`: with all of them too."""
    runs = []
    for algorithm, normalizer in methods:
        for domain in (*([None] if seen else []), *left_out):
            for seed in seeds:
                # A run's noise is of its method and seed: that the accuracies of two sweeps differ by domain is in the level.
                level = (
                    LEVELS[algorithm, normalizer]
                    + (0.0 if domain is None else 0.02 * DOMAINS.index(domain))
                    + 0.01 * seed
                )
                path = write_federated_run(
                    folder / f"{algorithm}-{domain}-{seed}",
                    algorithm,
                    normalizer,
                    seed=seed,
                    accuracy=level,
                    rounds=4,
                    config={"data": {"seed": 0, "unseen_domains": [] if domain is None else [domain]}},
                )
                runs.append(read_run(path))
    return runs


def of(runs, algorithm, domain):
    return [
        run.summary["domains"][domain]["accuracy"]
        for run in runs
        if run.config["algorithm"] == algorithm and run.config["data"]["unseen_domains"] == [domain]
    ]


def test_runs_of_one_method_are_one_method_in_rows_of_their_own(tmp_path):
    runs = sweep(tmp_path)
    table = federated_comparison(runs)
    assert table.kinds == ("fedavg (bn)", "fedwon (none+sws)")
    assert [method.name for method in table.methods] == [
        f"{kind} without {domain}" for kind in table.kinds for domain in DOMAINS
    ]
    assert all(method.score().n == 3 for method in table.methods)
    assert not table.warnings
    unseen = unseen_comparison(table)
    for algorithm, kind in (("fedavg", "fedavg (bn)"), ("fedwon", "fedwon (none+sws)")):
        for domain in DOMAINS:
            found = unseen.accuracies(kind, "last")[domain]
            assert found == pytest.approx(statistics.fmean(of(runs, algorithm, domain)))


def test_findings_compare_methods_over_the_domains_they_left_out(tmp_path):
    runs = sweep(tmp_path)
    said = federated_claims(federated_comparison(runs))
    unseen = unseen_comparison(federated_comparison(runs))
    means = {
        name: [statistics.fmean(values) for values in zip(*(of(runs, name, domain) for domain in DOMAINS), strict=True)]
        for name in ("fedavg", "fedwon")
    }
    assert unseen.score("fedwon (none+sws)", DOMAINS, "last").accuracies == pytest.approx(means["fedwon"])
    found = difference(*(unseen.score(name, DOMAINS, "last") for name in ("fedwon (none+sws)", "fedavg (bn)")))
    assert found.how == "paired by seed"
    low, high = (100 * end for end in found.interval)
    assert said[0] == (
        "On 4 domains without a client, each left out in turn, mean test accuracy at the last round: fedavg (bn) "
        f"{100 * statistics.fmean(means['fedavg']):.1f} % (n = 3); fedwon (none+sws) "
        f"{100 * statistics.fmean(means['fedwon']):.1f} % (n = 3), {100 * found.value:.1f} points above, 95 % interval "
        f"{low:+.1f} to {high:+.1f}."
    )
    assert "at the round chosen by validation" in said[1]
    assert len(said) == 2, "nothing compares a method with itself"
    assert not any("without amazon" in sentence for sentence in said)
    other = federated_claims(federated_comparison(runs), control="fedwon")[0]
    assert "(n = 3); fedavg (bn)" in other
    assert "points below" in other


def test_where_one_method_left_out_less_only_the_common_domains_are_compared(tmp_path):
    runs = sweep(tmp_path / "a", methods=[("fedavg", "bn")])
    runs += sweep(tmp_path / "b", methods=[("fedwon", "none+sws")], left_out=DOMAINS[2:])
    first = federated_claims(federated_comparison(runs))[0]
    over = [
        100 * statistics.fmean(x for domain in DOMAINS[2:] for x in of(runs, name, domain))
        for name in ("fedavg", "fedwon")
    ]
    assert (
        f"over dslr, webcam alone, where fedavg (bn) has {over[0]:.1f} % (n = 3), fedwon (none+sws) {over[1]:.1f} %"
        in first
    )
    backwards = federated_claims(federated_comparison(runs), control="fedwon")[0]
    assert backwards.startswith("On dslr, webcam without a client")
    assert f"fedavg (bn) {over[0]:.1f} % (n = 3), {over[1] - over[0]:.1f} points below" in backwards
    apart = sweep(tmp_path / "c", methods=[("fedavg", "bn")], left_out=DOMAINS[:2])
    apart += sweep(tmp_path / "d", methods=[("fedwon", "none+sws")], left_out=DOMAINS[2:])
    assert "fedwon (none+sws) has none there" in federated_claims(federated_comparison(apart))[0]


def test_other_seeds_for_each_domain_give_a_mean_and_no_interval(tmp_path):
    runs = sweep(tmp_path / "a", left_out=DOMAINS[:2], seeds=(0, 1))
    runs += sweep(tmp_path / "b", left_out=DOMAINS[2:], seeds=(2, 3))
    score = unseen_comparison(federated_comparison(runs)).score("fedavg (bn)", DOMAINS, "last")
    assert score.seeds == (None,)
    assert score.mean == pytest.approx(statistics.fmean(x for domain in DOMAINS for x in of(runs, "fedavg", domain)))
    assert "interval" not in federated_claims(federated_comparison(runs))[0]


def test_differences_are_from_the_control_without_the_same_domain(tmp_path):
    runs = sweep(tmp_path, seen=True)
    contents = gather_federated(runs, control=None)
    rows = {method.name: method for method in contents.table.methods}
    assert contents.control.name == "fedavg (bn)"
    assert {name for name, row in rows.items() if contents.is_control(row)} == {
        "fedavg (bn)",
        *(f"fedavg (bn) without {domain}" for domain in DOMAINS),
    }
    assert {name for name, _, _ in contents.differences} == {name for name in rows if name.startswith("fedwon")}
    for domain in DOMAINS:
        name, base = f"fedwon (none+sws) without {domain}", rows[f"fedavg (bn) without {domain}"]
        found = contents.differences[name, "last", domain]
        assert found.value == pytest.approx(rows[name].score(domain).mean - base.score(domain).mean)
    assert {one.method for one in contents.convergence} == {"fedavg (bn)", "fedwon (none+sws)"}
    said = federated_claims(contents.table)
    assert said[0].startswith("Mean test accuracy over 4 domains at the last round, against fedavg (bn) with")
    assert said[2].startswith("On 4 domains without a client")
    note = "Each row is compared with the control's that left out the same domains."
    assert note in render_page(runs, **SAID).replace("&#39;", "'")
    assert note in render_markdown(runs, **SAID)
    assert '"control": "fedavg (bn)"' in render_json(runs, **SAID)


def test_several_unseen_domains_are_compared_by_their_mean_over_the_others(tmp_path):
    runs = [
        read_run(
            write_federated_run(
                tmp_path / f"{algorithm}{len(unseen)}",
                algorithm,
                "bn",
                rounds=4,
                config={"data": {"unseen_domains": unseen}},
            )
        )
        for algorithm, left_out in (("fedavg", ([], ["dslr", "webcam"])), ("fedbn", (["dslr", "webcam"], ["dslr"])))
        for unseen in left_out
    ]
    table = federated_comparison(runs)
    assert unseen_comparison(table) is None
    said = federated_claims(table)
    against = "against fedavg (bn) without dslr, webcam"
    assert next(sentence for sentence in said if against in sentence).startswith(
        "Mean test accuracy over 2 domains at the last"
    )
    assert "fedavg (bn) was not run without the same domains as fedbn (bn) without dslr." in said
    assert compare_runs(runs[:1]).unseen is None


def test_one_method_left_out_in_turn_is_told_and_called_no_comparison(tmp_path):
    said = federated_claims(federated_comparison(sweep(tmp_path, methods=[("fedavg", "bn")])))
    assert said[0].startswith("One method is no comparison")
    assert said[1].startswith(
        "On 4 domains without a client, each left out in turn, mean test accuracy at the last round: fedavg (bn)"
    )
