import html
import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from report_folders import prediction, write_pictures, write_run, write_study

from batchless.report import claims, comparison, write_page
from batchless.report.commands import repetition
from batchless.report.page import render_page
from batchless.runs import RunFolder, find_runs, read_run

HOSTILE = "<script>alert(1)</script>\"'&amp;"
VOID = {"meta", "br", "link", "img", "hr", "input"}
CURVE = [{"kind": "test", "images": 100 * i, "accuracy": 0.1 * i} for i in range(1, 8)]


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text; asserts that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.words, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(runs, **more):
    return render_page(runs, **{"title": "A title", "findings": [], "commands": [], **more})


@pytest.fixture
def runs(make_runs):
    return make_runs(
        {"bn": {1: ["one value per channel"] * 2, 2: [0.5, 0.52]}, "gn+ws": {1: [0.7, 0.71], 2: [0.7, 0.72]}},
        curve=CURVE,
    )


def test_the_page_holds_the_numbers_the_reasons_and_the_commands(runs):
    command = "batchless train --normalizer 'gn+ws' && echo \"done\" > file"
    seen = Page(page(runs, title="Few images", findings=["bn loses 3.1 +- 0.2 %."], commands=["make demo", command]))
    assert "Few images" in seen.text
    assert "bn loses 3.1 \xb1 0.2 %." in seen.text
    assert "51.0 sd 1.4 \xb7 n = 2" in seen.text
    assert "71.0 sd 1.4 \xb7 n = 2" in seen.text
    assert "2 of 2 failed: one value per channel" in seen.text
    assert "make demo" in seen.words
    assert command in seen.words
    assert "A CPU" in seen.text
    assert "2026-01-01 10:20 UTC" in seen.text


def figures(text):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text)[1])


def without_plotly(text):
    """The page without the script that is not ours."""
    return "".join(re.split(r"<script>\s*/\*\*\s*\* plotly.js.*?</script>", text, flags=re.DOTALL))


def test_every_figure_has_its_place_and_is_told_in_words(runs):
    text = page(runs)
    assert list(figures(text)) == ["accuracy", "learning-1", "learning-2"]
    seen = Page(text)
    for name in figures(text):
        assert ("id", name) in seen.attributes
    assert seen.elements.count("noscript") == 1
    labels = [value for name, value in seen.attributes if name == "aria-label"]
    assert any("Test accuracy against images per forward" in label for label in labels)
    assert "gn+ws 2 1 7 10 % after 100 70 % after 700 70 % after 700" in seen.text


def test_the_swatches_are_well_formed(runs):
    swatches = re.findall(r"<svg.*?</svg>", without_plotly(page(runs)), flags=re.DOTALL)
    assert len(swatches) == 2 * 3  # in the table, and in the legends of both kinds of chart
    assert all(ElementTree.fromstring(swatch).get("aria-hidden") == "true" for swatch in swatches)


def test_the_numbers_are_compared_with_a_control(runs):
    text = Page(page(runs)).text
    assert "The control is bn at 2 images per forward ." in text
    assert "bn 2 51.0 1.4 2 100 control" in text
    assert "gn+ws 2 71.0 1.4 2 100 +20.0 " in text
    assert "The control is gn+ws at 1 image per forward ." in Page(page(runs, control="gn+ws@1")).text
    assert "bn at 1 image per forward , which has no accuracy" in Page(page(runs, control="bn@1")).text


def test_nothing_is_fetched_and_only_known_scripts_run(runs):
    text = page(runs)
    seen = Page(text)
    assert not {"link", "img", "iframe", "object", "base"} & set(seen.elements)
    names = {name for name, _ in seen.attributes}
    assert not {"src", "href", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    rest = without_plotly(text)
    assert len(rest) < len(text) / 10
    assert "://" not in rest
    assert "@import" not in rest
    assert "url(" not in rest
    policy = next(value for name, value in seen.attributes if name == "content" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; ")
    assert len(re.findall(r"'sha256-[\w+/]+='", policy)) == 2
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy
    assert len(seen.scripts) == 3
    assert text.count("* plotly.js v") == 1


def test_hostile_names_are_text_everywhere(make_run):
    config = {"model": HOSTILE, "nested": {HOSTILE: HOSTILE}}
    hostile = [
        make_run(HOSTILE, 1, HOSTILE, config=config, environment={"cpu": HOSTILE, HOSTILE: HOSTILE}),
        make_run(HOSTILE, 2, 0.5, config=config, curve=CURVE, seed=HOSTILE),
        make_run("gn", 2, 0.5, curve=CURVE),
    ]
    text = page(hostile, title=HOSTILE, findings=claims(comparison(hostile)), commands=[HOSTILE])
    seen = Page(text)
    assert seen.elements.count("script") == text.lower().count("<script") == 3
    assert figures(text)["accuracy"]["data"][0]["name"] == html.escape(HOSTILE, quote=False)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert HOSTILE in seen.words
    assert text.count("&lt;script&gt;") > 10


def test_differences_and_only_they_are_shown_before_the_findings(runs):
    assert "Read this first" not in page(runs)
    runs[0].config["model"] = "vgg"
    text = Page(page(runs, findings=["A finding."])).text
    assert text.index("not like for like: model is vgg (1 run), resnet8 (7 runs)") < text.index("A finding.")
    assert "all runs have the same configuration" not in text


def test_runs_that_say_little_still_make_a_page(make_run):
    run = make_run("bn", 1, None)
    run.environment.clear()
    text = Page(page([run])).text
    assert "not finished" in text
    assert "No run has come to a test accuracy." in text
    assert "Learning curves" not in text
    assert "1 of 1 run folders have no conversion.json" in text


def test_without_charts_there_are_no_scripts(make_run):
    text = page([make_run("bn", 1, None)])
    assert "script" not in Page(text).elements
    assert "script-src 'none'" in text
    assert len(text) < 50_000


def test_a_changed_checkout_is_said(make_run):
    assert "abc123, with changes" in page([make_run("bn", 1, 0.5, environment={"git_dirty": True})])
    assert "with changes" not in page([make_run("bn", 1, 0.5)])


def test_the_same_runs_give_the_same_page(runs):
    assert page(runs) == page(runs)


def test_colours_can_be_told_from_the_page_in_light_and_in_dark(runs):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    schemes = re.findall(r":root \{(.*?)\}", page(runs), flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = {
            name: value * (2 if len(value) == 3 else 1) for name, value in re.findall(r"--(\w+): #(\w+);", scheme)
        }
        series = [colours[f"c{index}"] for index in range(8)]
        assert len(set(series)) == 8
        assert min(contrast(colour, colours["page"]) for colour in series) >= 4.5
        assert contrast(colours["soft"], colours["page"]) >= 4.5
        assert contrast(colours["warn"], colours["panel"]) >= 4.5


def test_the_page_is_written_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    file = tmp_path / "deep" / "report.html"
    write_page(file, runs, title="one", findings=[], commands=[])
    before = file.read_text()
    assert before.startswith("<!doctype html>")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*report\.html: No space left on device"):
        write_page(file, runs, title="two", findings=[], commands=[])
    assert file.read_text() == before
    assert os.listdir(file.parent) == ["report.html"]


def test_a_place_where_no_page_can_be(runs, tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        write_page(tmp_path, runs, title="", findings=[], commands=[])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the folder .*file for the page"):
        write_page(tmp_path / "file" / "a.html", runs, title="", findings=[], commands=[])


def test_a_path_that_is_not_utf8_can_be_written(runs, tmp_path):
    write_page(tmp_path / "a.html", runs, title="t", findings=[], commands=["train --root \udcff"])
    assert "train --root \\udcff" in (tmp_path / "a.html").read_text("utf-8")


def test_from_run_folders_to_a_page(tmp_path):
    for name, size, accuracy in (("bn", 2, 0.5), ("bn", 32, 0.7), ("gn+ws", 2, 0.7), ("gn+ws", 32, float("nan"))):
        config = {"normalizer": name, "images_per_forward": size, "images_per_step": 32, "model": "m", "seed": 1}
        with RunFolder.create(tmp_path / f"{name}-{size}", config=config, seed=1) as folder:
            for images in (32, 64):
                folder.log(
                    {"kind": "train", "images": images, "loss": 1 / images, "accuracy": 0.5, "images_per_second": 9.0}
                )
                folder.log({"kind": "test", "images": images, "loss": 1.0, "accuracy": accuracy})
            folder.finish({"test_accuracy": accuracy, "images_per_second": 9.0, "images": 64, "seconds": 1.0})
    runs = find_runs(tmp_path)
    table = comparison(runs)
    write_page(tmp_path / "report.html", runs, title="t", findings=claims(table), commands=["make demo"])
    text = Page((tmp_path / "report.html").read_text()).text
    assert "failed: its test accuracy is nan" in text
    assert "cannot be judged: there is no accuracy to compare with for gn+ws" in text
    assert "4 run folders" in text


def test_a_page_of_whole_run_folders_has_every_part(tmp_path):
    runs = write_study(tmp_path, seeds=2)
    text = page(runs)
    seen = Page(text)
    for part in ("Derived settings", "4 groups of 4", "Sample predictions", "Worst", "Typical", "truth: seven", "93"):
        assert part in seen.text
    assert "272 MiB" in seen.text
    assert "2 of 2 failed: Expected more than 1 value per channel" in seen.text
    assert "failed: Expected more than 1 value per channel when training" in seen.words
    assert "2 of 24 run folders have no conversion.json" in seen.text
    assert repetition(runs[0]) in seen.words
    assert runs[0].environment["command"] in seen.words
    pictures = [value for name, value in seen.attributes if name == "src"]
    assert pictures
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert seen.elements.count("img") == len(pictures) == sum(name == "alt" for name, _ in seen.attributes)


def test_hostile_extras_are_text(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "run")),
        read_run(write_run(tmp_path / "other", "gn", config={HOSTILE: HOSTILE})),
    ]
    write_pictures(runs[0].path, [prediction(truth=HOSTILE, predicted=HOSTILE, source=HOSTILE)])
    entry = {"name": HOSTILE, "action": HOSTILE, "was": HOSTILE, "now": HOSTILE, "detail": HOSTILE}
    told = {"normalizer": HOSTILE, "found_by": HOSTILE, "notes": [HOSTILE], "entries": [entry]}
    (runs[0].path / "conversion.json").write_text(json.dumps(told))
    (runs[1].path / "pictures" / "predictions.json").write_text(json.dumps([prediction(picture=HOSTILE, kind=HOSTILE)]))
    runs[0].environment["command"] = HOSTILE
    seen = Page(page(runs))
    assert seen.words.count(HOSTILE) > 10
    assert seen.elements.count("script") == 3
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert [value for name, value in seen.attributes if name == "alt"] == [
        f"An image of {HOSTILE}, predicted as {HOSTILE}"
    ]
