"""Benchmarks' run folders in a report: shown as they were printed, beside other runs or alone."""

import json

import pytest
from report_folders import write_run

from batchless.report import compare_runs, render_json, render_markdown, render_page
from batchless.report.commands import repetition
from batchless.report.timings import COMPARISONS, read_benchmarks
from batchless.runs import RunFolder, read_run

SAID = {"title": "Times", "findings": [], "commands": []}
HOSTILE = "<b>|[x](y)"
TABLES = [[["", "min ms"], [HOSTILE, "10.0"], ["slow", "40.0"]], [["target", "verdict"], ["a <= 0.5 x b", "met"]]]
TOLD = [{"title": "two ways (6 rounds)", "tables": TABLES, "notes": ["a note"], "seconds": {"slow": [0.04] * 6}}]


@pytest.fixture
def write_bench(tmp_path):
    def write(name="norms", *, told=TOLD, summary=(("load", "load 0.10 before, 1.00 after"), ("seconds", 3.0))):
        config = {"kind": "bench", "benchmark": name, "repeats": 6, "threads": 1, "clock": "wall", "seed": 0}
        with RunFolder.create(tmp_path / f"bench {name}", config=config, seed=0) as folder:
            (folder.path / COMPARISONS).write_text(json.dumps(told))
            if summary is not None:
                folder.finish(dict(summary))
        return read_run(folder.path)

    return write


def test_every_format_has_the_tables_and_the_verdicts(write_bench):
    runs = [write_bench("norms"), write_bench("step")]
    page, markdown = render_page(runs, **SAID), render_markdown(runs, **SAID)
    for text in (page, markdown):
        assert text.count("two ways (6 rounds)</h3>") + text.count("### two ways (6 rounds)\n") == 2
        assert "bench norms" in text
        assert "load 0.10 before, 1.00 after" in text
        assert HOSTILE not in text
    assert "| &lt;b>\\|\\[x](y) | 10.0 |" in markdown
    assert "| a &lt;= 0.5 x b | met |" in markdown
    assert "<td>met</td>" in page
    assert "&lt;b&gt;|[x](y)" in page
    told = json.loads(render_json(runs, **SAID))
    assert [one["config"]["benchmark"] for one in told["benchmarks"]] == ["norms", "step"]
    assert told["benchmarks"][0]["comparisons"][0]["tables"] == TABLES


def test_the_terminal_shows_names_with_brackets(write_bench, capsys):
    from rich.console import Console

    Console(width=200).print(compare_runs([write_bench()]).rich())
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("bench norms", "two ways (6 rounds)", HOSTILE, "10.0", "met", "a note"))


def test_a_benchmark_is_repeated_by_its_own_command(write_bench):
    run = write_bench("step")
    expected = f"python -m bench step --repeats 6 --threads 1 --clock wall --seed 0 --out '{run.path}-again'"
    assert repetition(run) == expected


def test_benchmarks_stand_beside_runs_that_learned(write_bench, tmp_path):
    trained = read_run(write_run(tmp_path / "trained", "gn", 2))
    together = compare_runs([write_bench(), trained])
    assert [cell.normalizer for cell in together.trained.cells] == ["gn"]
    assert [one.title for one in together.benchmarks] == ["bench norms"]
    alone = compare_runs([trained])
    assert together.markdown().startswith(alone.markdown())
    assert "two ways" in together.markdown()
    assert render_markdown([write_bench("step"), trained], **SAID, control="gn@2").count("two ways") == 1


def test_a_control_is_refused_where_there_are_only_benchmarks(write_bench):
    with pytest.raises(ValueError, match="leave --control out"):
        render_markdown([write_bench()], **SAID, control="gn")


@pytest.mark.parametrize(
    ("summary", "said"), [(None, "not finished"), ((("failed", "no memory"),), "failed: no memory")]
)
def test_what_was_done_before_the_end_is_shown(write_bench, summary, said):
    (found,) = read_benchmarks([write_bench(summary=summary)])
    assert found.lines[-1] == said
    assert len(found.timings) == 1


def test_a_benchmark_without_tables_yet_is_no_error(write_bench):
    run = write_bench(summary=None)
    (run.path / COMPARISONS).unlink()
    (found,) = read_benchmarks([run])
    assert found.timings == ()


@pytest.mark.parametrize(
    "told", [3, {"title": 1}, [{"title": "t"}], [{"title": "t", "tables": [[["", "a"], ["b"]]], "notes": []}], [[]]]
)
def test_damaged_tables_are_named(write_bench, told):
    with pytest.raises(ValueError, match=r"comparisons\.json is damaged"):
        read_benchmarks([write_bench(told=told)])
