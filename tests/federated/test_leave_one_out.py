"""Each domain in turn without a client: the runs, going on with them, and the table."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from domain_runs import config, write_domains

from batchless.cli import main
from batchless.federated import FederateConfig, leave_one_domain_out, resume_federation, run_federation
from batchless.federated.leave_one_out import without_each_domain
from batchless.report import compare_runs, render_json, render_markdown, render_page
from batchless.runs import find_runs, read_run
from batchless.train import TrainingStoppedError

DOMAINS = ("inverted", "pale", "plain")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


def asked(root: Path, out: Path, **changes: object) -> FederateConfig:
    return config("fedavg", root, out, clients_per_domain=1, leave_one_domain_out=True, **changes)


def test_the_command_leaves_each_domain_out_and_shows_the_table(root, tmp_path, capsys):
    words = ["federate", "--leave_one_domain_out", "true", "--out", str(tmp_path / "sweep"), "--data.root", str(root)]
    words += ["--data.image_size", "8", "--rounds", "1", "--workers", "1", "--tensorboard", "false"]
    assert main(words) == 0
    output = " ".join(capsys.readouterr().out.split())
    runs = {run.config["data"]["unseen_domains"][0]: run for run in find_runs(tmp_path / "sweep")}
    assert set(runs) == set(DOMAINS)
    for domain, run in runs.items():
        assert run.path.name == f"without-{domain}"
        tested = {line["domain"]: line["accuracy"] for line in run.metrics if line["kind"] == "test"}
        assert f"{100 * tested[domain]:.1f}" in output
        seen = [tested[other] for other in DOMAINS if other != domain]
        assert tested["mean"] == pytest.approx(sum(seen) / 2)
    assert "Leave-one-domain-out" in output
    seconds = [run.summary["seconds"] for run in runs.values()]
    assert main(words) == 0
    assert [read_run(run.path).summary["seconds"] for run in runs.values()] == seconds, "done once"


def test_given_again_it_goes_on_with_what_is_not_done(root, tmp_path):
    sweep = asked(root, tmp_path / "sweep")
    first, second, third = without_each_domain(sweep)
    run_federation(first)
    with pytest.raises(TrainingStoppedError):
        run_federation(second, should_stop=iter([False] * 3 + [True] * 9).__next__)
    done: list[tuple[str, bool]] = []

    def run_one(one: FederateConfig, begun: bool) -> None:
        done.append((one.data.unseen_domains[0], begun))
        resume_federation(one.folder()) if begun else run_federation(one)

    folders = leave_one_domain_out(sweep, run_one)
    assert done == [("pale", True), ("plain", False)]
    assert folders == [first.folder(), second.folder(), third.folder()]
    assert all(read_run(folder).summary["rounds"] == 2 for folder in folders)
    shutil.rmtree(folders[0])
    with pytest.raises(
        ValueError, match=r"without-pale holds a run of other settings \(seed is 0, not 1\): choose another"
    ):
        leave_one_domain_out(replace(sweep, seed=1), run_one)


def test_runs_without_one_domain_are_a_row_of_a_table(root, tmp_path):
    runs = []
    for name in ("fedavg", "fedwon"):
        sweep = config(name, root, tmp_path / name, clients_per_domain=1, rounds=1, leave_one_domain_out=True)
        runs += [read_run(f) for f in leave_one_domain_out(sweep, lambda one, begun: run_federation(one))]
    table = compare_runs(runs).unseen
    assert table is not None
    assert table.domains == DOMAINS
    assert table.methods == ("fedavg (bn)", "fedwon (none+sws)")
    for run in runs:
        (domain,) = run.config["data"]["unseen_domains"]
        name = next(name for name in table.methods if name.startswith(run.config["algorithm"]))
        assert table.accuracies(name, "last")[domain] == run.summary["domains"][domain]["accuracy"]
    said = {"title": "A title", "findings": compare_runs(runs).findings(), "commands": ["a command"]}
    mean = f"{100 * sum(table.accuracies('fedwon (none+sws)', 'last').values()) / 3:.1f}"
    for text in (render_page(runs, **said), render_markdown(runs, **said)):
        assert "Leave-one-domain-out" in text
        assert f"fedwon (none+sws) {mean} %" in text.replace("\N{NO-BREAK SPACE}", " ").replace("\\", "")
    told = json.loads(render_json(runs, **said))["unseen"]
    assert told["fedwon (none+sws)"]["last"] == table.accuracies("fedwon (none+sws)", "last")
    assert compare_runs(runs[:1]).unseen is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"unseen_domains": ("pale",)}, "leaves each domain out in turn: data.unseen_domains must be empty, got pale"),
        ({"domains": ("pale",)}, "needs two domains or more, there is pale"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(data, message, root, tmp_path):
    with pytest.raises(ValueError, match=message):
        without_each_domain(asked(root, tmp_path / "run", data=data))


def test_a_single_run_is_not_several(root, tmp_path):
    with pytest.raises(ValueError, match="leave_one_domain_out is several runs"):
        run_federation(asked(root, tmp_path / "run"))
