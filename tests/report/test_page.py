import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from batchless.report import claims, comparison, write_page
from batchless.report.page import render_page
from batchless.runs import RunFolder, find_runs

HOSTILE = "<script>alert(1)</script>\"'&amp;"
VOID = {"meta", "br", "link", "img", "hr", "input"}
CURVE = [{"kind": "test", "images": 100 * i, "accuracy": 0.1 * i} for i in range(1, 8)]


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text; asserts that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.words = [], [], [], []
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
        if self.open and self.open[-1] != "style":
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


def test_every_marker_has_its_numbers_as_a_title(runs):
    titles = re.findall(r"<title>(.*?)</title>", page(runs))
    assert "gn+ws, images per forward 1: 70.5 +- 0.7 (n=2)" in titles
    assert "bn, images per forward 1: 2 of 2 failed: one value per channel" in titles
    assert "gn+ws, seed 1: 70 % after 700 images" in titles


def test_the_figures_are_well_formed(runs):
    figures = re.findall(r"<svg.*?</svg>", page(runs), flags=re.DOTALL)
    assert sum('class="chart"' in figure for figure in figures) == 3
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("aria-label") or root.get("aria-hidden") == "true"


def test_nothing_is_fetched_and_nothing_is_run(runs):
    text = page(runs)
    seen = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(seen.elements)
    names = {name for name, _ in seen.attributes}
    assert not {"src", "href", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_hostile_names_are_text_everywhere(make_run):
    config = {"model": HOSTILE, "nested": {HOSTILE: HOSTILE}}
    hostile = [
        make_run(HOSTILE, 1, HOSTILE, config=config, environment={"cpu": HOSTILE, HOSTILE: HOSTILE}),
        make_run(HOSTILE, 2, 0.5, config=config, curve=CURVE, seed=HOSTILE),
        make_run("gn", 2, 0.5, curve=CURVE),
    ]
    text = page(hostile, title=HOSTILE, findings=claims(comparison(hostile)), commands=[HOSTILE])
    seen = Page(text)
    assert "script" not in seen.elements
    assert "<script" not in text
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
    assert "Speed" not in text


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
        folder = RunFolder.create(tmp_path / f"{name}-{size}", config=config, seed=1)
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
