"""The page in a browser: it opens without a complaint, draws its charts, and shows numbers where one points."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess

import pytest
from federated_folders import record, write_federated_run, write_federation_study
from report_folders import prediction, write_pictures, write_run, write_study

from batchless.report import claims, compare_runs, comparison
from batchless.report.page import render_page
from batchless.runs import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH: apt-get install chromium")

WATCH = """
window.complaints = [];
addEventListener("error", (event) => complaints.push(String(event.message || event.target.src)), true);
addEventListener("securitypolicyviolation", (event) => complaints.push("blocked: " + event.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...words) => complaints.push(kind + ": " + words.join(" "));
"""
LOOK = """
const labels = (id) => [...document.querySelectorAll("#" + id + " .hoverlayer text")].map((text) => text.textContent);
const count = (selector) => document.querySelectorAll(selector).length;
const nth = (id) => Math.max(0, document.getElementById(id).data.findIndex((trace) => trace.name === "gn+ws"));
const shown = () => count("#accuracy .scatterlayer .trace");
setTimeout(() => {
  const seen = { charts: count(".js-plotly-plot"), points: count("#accuracy .point"), bars: count("#accuracy .errorbar"),
                 lines: count("#learning-2 .js-line"), tables: count("table"), traces: shown(),
                 colour: getComputedStyle(document.body).backgroundColor,
                 paper: document.querySelector("#accuracy .main-svg").style.background,
                 width: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
                 pictures: [...document.images].map((image) => image.naturalWidth) };
  Plotly.Fx.hover("accuracy", [{ curveNumber: nth("accuracy"), pointNumber: 0 }]);
  seen.accuracy = labels("accuracy");
  Plotly.Fx.hover("learning-2", [{ curveNumber: nth("learning-2"), pointNumber: 1 }]);
  seen.learning = labels("learning-2");
  document.querySelector("button[data-series]").click();
  setTimeout(() => {
    seen.afterHiding = shown();
    seen.complaints = complaints;
    parent.postMessage(JSON.stringify(seen), "*");
  }, 500);
}, 1500);
"""

LOOK_FEDERATED = """
const labels = (id) => [...document.querySelectorAll("#" + id + " .hoverlayer text")].map((text) => text.textContent);
const count = (selector) => document.querySelectorAll(selector).length;
const title = () => document.querySelector("#curve-0 .xtitle").textContent;
const most = () => document.getElementById("curve-0").layout.xaxis.range[1];
setTimeout(() => {
  const seen = { charts: count(".js-plotly-plot"), points: count("#domains .point"), bars: count("#domains .errorbar"),
                 lines: count("#curve-0 .js-line"), heat: count("#partition-0 .heatmaplayer image"),
                 width: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
                 titles: [title()], ends: [most()] };
  Plotly.Fx.hover("domains", [{ curveNumber: 0, pointNumber: 4 }]);
  seen.domain = labels("domains");
  Plotly.Fx.hover("partition-0", { xval: 2, yval: 3 });
  seen.client = labels("partition-0");
  const buttons = [...document.querySelectorAll("button[data-across]")];
  buttons[1].click();
  document.querySelector("button[data-series]").click();
  setTimeout(() => {
    seen.titles.push(title());
    seen.ends.push(most());
    seen.pressed = buttons.map((button) => button.getAttribute("aria-pressed"));
    seen.linesAfterHiding = count("#curve-0 .js-line");
    seen.complaints = complaints;
    parent.postMessage(JSON.stringify(seen), "*");
  }, 500);
}, 1500);
"""


# A headless window is at least 500 pixels wide, a frame can be a phone.
FRAME = """
<html><script>addEventListener("message", (event) => { document.documentElement.dataset.seen = event.data; });</script>
<iframe src="page.html" style="border: 0; width: %dpx; height: 4000px"></iframe></html>
"""


def opened(text, folder, *flags, width=1000, look=LOOK):
    """Return what is seen of the page in a browser; the scripts that look are let in by their hash, as its own are."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (WATCH, look)]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    text = text.replace("script-src ", f"script-src {allowed} ", 1).replace(
        "<style>", f"<script>{WATCH}</script><style>", 1
    )
    head, _, tail = text.rpartition("</body>")
    (folder / "page.html").write_text(f"{head}<script>{look}</script></body>{tail}", encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME % width)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *flags]
    command += ["--window-size=1100,4100", "--virtual-time-budget=20000", "--dump-dom", frame.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found = re.search(r'<html[^>]* data-seen="([^"]*)"', finished.stdout)
    assert found, finished.stdout[:1000] + finished.stderr[-1000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    runs = write_study(tmp_path_factory.mktemp("study"), seeds=2)
    return render_page(runs, title="A study", findings=claims(comparison(runs)), commands=["make demo"])


def test_charts_tables_and_labels(text, tmp_path):
    seen = opened(text, tmp_path)
    assert seen["complaints"] == []
    assert seen["charts"] == 5
    assert seen["points"] == 3 * 4  # one of them a cross
    assert seen["bars"] == 3 * 4 - 1
    assert seen["lines"] == 6
    assert seen["tables"] >= 5
    label = "".join(seen["accuracy"])
    assert re.fullmatch(r"gn\+ws, 1 image per forward\d\d\.\d ± \d\.\d \(n=2\)", label)
    assert re.fullmatch(r"gn\+ws, seed 0\d\d\.\d+ % after 2,000 images", "".join(seen["learning"]))
    assert seen["traces"] == 4
    assert seen["afterHiding"] == 2  # bn's line and its cross are gone
    assert seen["paper"] == seen["colour"] == "rgb(255, 255, 255)"


def test_dark_and_as_narrow_as_a_phone(text, tmp_path):
    seen = opened(text, tmp_path, "--blink-settings=preferredColorScheme=0", width=375)
    assert seen["complaints"] == []
    assert seen["room"] == 375
    assert seen["width"] <= seen["room"]  # nothing but the tables' own boxes scrolls sideways
    assert seen["paper"] == seen["colour"] != "rgb(255, 255, 255)"
    assert seen["pictures"]


HOSTILE = "</script><script>complaints.push('run')</script><img src=x onerror=complaints.push('run')>%{x}\"'&amp;"


def test_hostile_names_do_nothing_and_are_shown_as_they_are(tmp_path):
    runs = [read_run(write_run(tmp_path / str(size), HOSTILE, size, accuracy=0.5)) for size in (2, 8)]
    entry = prediction(truth=HOSTILE, predicted=HOSTILE, source=HOSTILE)
    write_pictures(runs[0].path, [entry])
    runs[0].environment["command"] = HOSTILE
    seen = opened(render_page(runs, title=HOSTILE, findings=[HOSTILE], commands=[HOSTILE]), tmp_path)
    assert seen["complaints"] == []
    assert seen["pictures"] == [32] * 9
    label = "".join(seen["accuracy"]).replace(" ", "")
    assert label == f"{HOSTILE}, 2 images per forward50.0 (n=1)".replace(" ", "")
    assert "".join(seen["learning"]).replace(" ", "").startswith(f"{HOSTILE},seed0".replace(" ", ""))


@pytest.mark.parametrize(("width", "flags"), [(1000, []), (375, ["--blink-settings=preferredColorScheme=0"])])
def test_federated_charts_axes_and_partition(tmp_path, width, flags):
    runs = write_federation_study(tmp_path / "runs", seeds=2, partition=record(alpha=0.3))
    page = render_page(runs, title="A study", findings=compare_runs(runs).findings(), commands=["make demo"])
    seen = opened(page, tmp_path, *flags, width=width, look=LOOK_FEDERATED)
    assert seen["complaints"] == []
    assert (seen["charts"], seen["points"], seen["bars"], seen["lines"], seen["heat"]) == (7, 15, 15, 6, 1)
    assert re.fullmatch(r"fedavg \(bn\): mean\d\d\.\d ± \d\.\d % \(n=2\)", "".join(seen["domain"]))
    assert re.fullmatch(r"client 3, webcam\d+ of class two", "".join(seen["client"]))
    assert seen["titles"] == ["rounds", "images seen by all clients"]
    assert seen["ends"] == pytest.approx([1.05 * 20, 1.05 * 20 * 248])
    assert seen["pressed"] == ["false", "true", "false"]
    assert seen["linesAfterHiding"] == 4
    assert seen["width"] <= seen["room"] == width


def test_hostile_names_of_federated_runs_do_nothing(tmp_path):
    held = record() | {"classes": [HOSTILE] * 10}
    held["clients"] = [client | {"domain": HOSTILE} for client in held["clients"]]
    run = read_run(write_federated_run(tmp_path / "run", HOSTILE, HOSTILE, partition=held))
    seen = opened(render_page([run], title="A", findings=[], commands=[]), tmp_path, look=LOOK_FEDERATED)
    assert seen["complaints"] == []
    assert HOSTILE.replace(" ", "") in "".join(seen["client"]).replace(" ", "")
