"""Markdown and JSON say what the page says."""

import json
import math

import pytest
from report_folders import write_run, write_study

from batchless.report import render_json, render_markdown
from batchless.report.difference import choose_control, difference
from batchless.report.table import comparison
from batchless.runs import read_run

SAID = {"title": "A title", "findings": ["A finding."], "commands": ["make demo"]}
HOSTILE = "a|b</script><img src=x onerror=alert(1)>[x](javascript:y)`*\n# c"


def no_constant(text):
    raise AssertionError(f"{text} is not strict JSON")


def strict(text):
    return json.loads(text, parse_constant=no_constant)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


def test_json_holds_the_numbers_unrounded(study):
    told = strict(render_json(study, **SAID))
    table = comparison(study)
    control = choose_control(table)
    assert told["control"] == {"normalizer": "bn", "images_per_forward": 64}
    assert len(told["cells"]) == 12
    for cell, said in zip(table.cells, told["cells"], strict=True):
        assert (said["mean"], said["sd"], said["n"]) == (cell.mean, cell.sd, cell.n)
        expected = None if cell is control else difference(cell, control)
        assert (said["difference"] is None) == (expected is None)
        if expected is not None:
            assert said["difference"]["interval"] == list(expected.interval)
    failed = next(cell for cell in told["cells"] if cell["mean"] is None)
    assert failed["failures"] == ["Expected more than 1 value per channel when training"] * 3
    assert told["cells"][0]["peak_memory_bytes"] is None or told["cells"][0]["peak_memory_bytes"] > 2**28
    done = [cell for cell in told["cells"] if cell["mean"] is not None]
    assert all(cell["waiting_share"] == pytest.approx(0.5 / cell["images_per_forward"]) for cell in done)
    assert len(told["runs"]) == 36
    assert told["conversions"][0]["layers"][1]["detail"] == "4 groups of 4"
    assert "uri" not in told["predictions"][0]["shown"][0]
    assert (told["title"], told["findings"], told["commands"]) == ("A title", ["A finding."], ["make demo"])


def test_markdown_has_a_row_per_cell_with_the_control_named(study):
    text = render_markdown(study, **SAID, control="gn+ws@2")
    assert text.startswith("# A title\n\n## Findings\n\n- A finding.\n")
    assert "The control is gn+ws at 2 images per forward." in text
    table = text[text.index("## All numbers") : text.index("## Learning")]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 12
    assert len({line.count("|") for line in rows}) == 1
    assert sum("| control |" in line for line in rows) == 1
    assert "| waiting for data |" in rows[0]
    assert "| 25 % |" in next(line for line in rows if "| control |" in line)
    assert "| paired by seed |" in rows[3]
    assert "make demo" in text
    assert "4 groups of 4" in text


def test_one_seed_says_so(tmp_path):
    runs = [read_run(write_run(tmp_path / name, name, 2, accuracy=0.5)) for name in ("bn", "gn")]
    assert "| +0.0 |  | none: one seed |" in render_markdown(runs, **SAID)


@pytest.mark.parametrize("render", [render_json, render_markdown])
def test_a_control_that_was_not_run_is_refused(study, render):
    with pytest.raises(ValueError, match="control is 'ln', which was not run"):
        render(study, **SAID, control="ln")


def test_names_from_data_stay_in_their_place(make_run):
    config = {"model": HOSTILE, HOSTILE: math.nan, "nested": {"x": math.inf}}
    runs = [make_run(HOSTILE, 2, 0.5, config=config), make_run("gn", 2, HOSTILE, config={"model": "m"})]
    said = {"title": HOSTILE, "findings": [HOSTILE], "commands": [f"{HOSTILE}\n```\nx"]}
    told = strict(render_json(runs, **said))
    assert told["runs"][0]["config"]["nested"] == {"x": "inf"}
    assert told["cells"][0]["normalizer"] == HOSTILE
    text = render_markdown(runs, **said)
    outside, _, rest = text.partition("````")  # a longer fence than the one in the command
    assert "````" in rest
    assert "<img" not in outside
    assert "](" not in outside.replace("\\[x](", "")
    for block in text.split("\n\n"):
        if block.startswith("|"):
            bars = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(bars) == 1


def test_a_byte_that_is_no_text_in_a_path_is_json(make_run):
    run = make_run("gn", 2, 0.5, config={"data": "/tmp/\udcff"})
    render_json([run], **SAID).encode("ascii")
