import pytest

from batchless.report import claims, comparison
from batchless.report.claims import uses_batch_statistics

SUPPORTS = {
    "bn": {2: [0.50, 0.52, 0.51], 32: [0.71, 0.70, 0.72]},
    "gn": {2: [0.66, 0.67, 0.66], 32: [0.66, 0.67, 0.67]},
    "gn+ws": {2: [0.70, 0.71, 0.70], 32: [0.71, 0.70, 0.71]},
    "bcn-micro+ws": {2: [0.72, 0.71, 0.72], 32: [0.72, 0.72, 0.71]},
}


@pytest.fixture
def said(make_runs):
    def say(accuracies, **more):
        return claims(comparison(make_runs(accuracies, **more)))

    return say


def first_seeds(accuracies):
    return {name: {size: seeds[0] for size, seeds in by.items()} for name, by in accuracies.items()}


def test_shown_when_the_numbers_show_it(said):
    verdict, losses = said(SUPPORTS)
    assert verdict.startswith(
        '"Batch statistics fail at 2 images per forward while WS and BCN keep their accuracy" is shown'
    )
    assert "3 seeds or more each" in verdict
    assert "bcn-micro+ws with 71.7 %, is 0.7 points above bn at 32" in verdict
    assert "bn lost 20.0 (51.0 +- 1.0 % against 71.0 +- 1.0 %)" in losses
    assert "gn lost 0.3" in losses
    assert "bcn-micro+ws lost 0.0" in losses
    assert losses.endswith("n = 3 each.")


def test_one_seed_is_no_proof(said):
    sentences = said(first_seeds(SUPPORTS))
    assert "agrees with these numbers, but one seed is no proof" in sentences[0]
    assert "shown" not in sentences[0]
    assert sentences[-1].startswith("Every accuracy here is from one seed, and one seed is no proof")


def test_one_cell_with_one_seed_is_enough_for_the_doubt(said):
    sentences = said({**SUPPORTS, "gn+ws": {2: 0.70, 32: [0.71, 0.70]}})
    assert "one seed is no proof" in sentences[0]
    assert "gn+ws lost 0.5 (70.0 %, n = 1 against 70.5 +- 0.7 %, n = 2)" in sentences[1]
    assert sentences[-1].startswith("Some accuracies here are from one seed")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bn": {2: [0.70, 0.71], 32: [0.71, 0.72]}}, "bn lost 1.0 points (failing is 5 or more lost)"),
        ({"bn": {2: [0.72, 0.73], 32: [0.70, 0.71]}}, "bn gained 2.0 points (failing is 5 or more lost)"),
        ({"bn": {2: [0.3, 0.69], 32: [0.70, 0.71]}}, "bn lost 21.0 points, which its spread over seeds may explain"),
        ({"gn+ws": {2: [0.60, 0.61], 32: [0.70, 0.71]}}, "gn+ws lost 10.0 points (keeping is 2 or less lost)"),
        (
            {"gn+ws": {2: [0.60, 0.80], 32: [0.70, 0.71]}},
            "gn+ws lost 0.5 points, but its spread over seeds allows a loss of 5",
        ),
        ({"gn+ws": {2: [0.40, 0.40], 32: [0.40, 0.40]}}, "gn+ws has 40.0 % there, bn 51.0 %"),
        ({"bcn-micro+ws": {2: ["diverged", "diverged"], 32: [0.7, 0.7]}}, "bcn-micro+ws could not be trained"),
        ({"bcn-micro+ws": {2: [0.7, 0.7, "nan"], 32: [0.7, 0.7]}}, "bcn-micro+ws: 1 of 3 failed: nan"),
        ({"bcn+ws": {2: [0.7, 0.7], 32: [0.7, 0.7]}}, "bcn+ws lost 0.0 points (failing is 5 or more lost)"),
    ],
)
def test_not_shown_is_said_plainly_with_the_reason(said, change, why):
    verdict = said({**SUPPORTS, **change})[0]
    assert "is NOT shown by these numbers: " in verdict
    assert why in verdict


def test_the_whole_claim_fails_when_nothing_of_it_holds(said):
    verdict = said({"bn": {2: 0.7, 32: 0.7}, "gn+ws": {2: 0.6, 32: 0.7}})[0]
    assert "NOT shown" in verdict
    for why in ("bn lost 0.0", "gn+ws lost 10.0", "gn+ws has 60.0 % there, bn 70.0 %"):
        assert why in verdict


def test_batch_statistics_that_cannot_be_trained_have_failed(said):
    runs = {"bn": {1: ["one value per channel"] * 2, 32: [0.7, 0.71]}, "gn+ws": {1: [0.69, 0.7], 32: [0.7, 0.69]}}
    verdict, losses = said(runs)
    assert "at 1 image per forward" in verdict
    assert "is shown by these numbers, 2 seeds or more each" in verdict
    assert "is 1.0 points below bn at 32" in verdict
    assert "bn has nothing to compare (no accuracy [2 of 2 failed: one value per channel]" in losses


def test_a_run_that_was_only_interrupted_has_not_failed(said):
    verdict = said({**SUPPORTS, "bn": {2: [None, None], 32: [0.7, 0.7]}})[0]
    assert verdict.endswith("cannot be judged: there is no accuracy to compare with for bn.")


def test_no_accuracy_at_the_large_batch_leaves_nothing_to_judge(said):
    verdict = said({**SUPPORTS, "gn+ws": {2: [0.7, 0.7], 32: ["disk", "disk"]}})[0]
    assert "cannot be judged: there is no accuracy to compare with for gn+ws" in verdict


@pytest.mark.parametrize(
    ("left_out", "what"),
    [
        (("bn",), "no normalizer with batch statistics was run at both 2 and 32"),
        (
            ("gn+ws", "bcn-micro+ws"),
            "no normalizer with WS or BCN and without batch statistics was run at both 2 and 32",
        ),
    ],
)
def test_a_missing_side_is_not_a_verdict(said, left_out, what):
    sentences = said({name: by for name, by in SUPPORTS.items() if name not in left_out})
    assert f"cannot be judged: {what}" in sentences[0]
    assert "gn lost 0.3" in sentences[1]


def test_every_micro_batch_size_is_judged_on_its_own(said):
    runs = {"bn": {1: 0.3, 2: 0.7, 32: 0.7}, "gn+ws": {1: 0.69, 2: 0.7, 32: 0.7}}
    one, _, two, losses, _ = said(runs)
    assert "at 1 image per forward" in one
    assert "agrees" in one
    assert "at 2 images per forward" in two
    assert "NOT shown" in two
    assert losses.startswith("At 2 images per forward against 32")


@pytest.mark.parametrize("sizes", [(1, 2), (8, 32), (2,)])
def test_without_a_micro_batch_and_a_larger_one_nothing_is_claimed(said, sizes):
    (sentence,) = said({"bn": dict.fromkeys(sizes, 0.5), "gn+ws": dict.fromkeys(sizes, 0.5)})
    assert sentence.startswith("Nothing can be said about micro-batches")


def test_runs_that_are_not_alike_show_nothing(make_runs):
    runs = make_runs(SUPPORTS)
    runs[0].config["model"] = "another"
    sentences = claims(comparison(runs))
    assert "agrees with these numbers, but the runs are not like for like" in sentences[0]
    assert sentences[-1].startswith("The runs are not like for like in everything")


def test_a_mean_over_the_seeds_that_did_not_fail_is_called_too_good(said):
    sentences = said({**SUPPORTS, "gn": {2: [0.6, "nan"], 32: [0.6, 0.6]}})
    assert "Where only some seeds failed, the mean is over the others, and so is too good." in sentences


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("bn", True),
        ("bn+ws(preset=authors)", True),
        ("sync-bn", True),
        ("bcn(groups=4)+ws", True),
        ("bcn-micro(memory=100)+ws", False),
        ("frozen-bn", False),
        ("gn(groups=16)+ws", False),
        ("none+sws", False),
        ("<script>", False),
    ],
)
def test_which_normalizers_use_batch_statistics(name, batch):
    assert uses_batch_statistics(name) is batch
