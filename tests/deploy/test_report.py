"""Opens the reports of `plan` and `replay` in a real browser, and measures what a reader would see: light and dark, wide and narrow."""

import base64
import json
import os
import re
import subprocess

import pytest

from test_binaries import CLEAN, CLI, run
from tools import ROOT, library_path

CHAT = ROOT / "client" / "workloads" / "chat.jsonl"
# preferredColorScheme of the browser's settings.
SCHEMES = {"dark": 0, "light": 1}
WIDTHS = {"desktop": 1280, "phone": 390}
# WCAG 2.1, level AA: text, and parts of charts.
TEXT_CONTRAST, CHART_CONTRAST = 4.5, 3.0

# Runs in a copy of the page, when all that it fetches is there or has failed. It leaves its results in the document, which the browser prints.
MEASURE = """
addEventListener('load', () => {
const colour = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const back = colour(getComputedStyle(document.body).backgroundColor);
const texts = [...document.querySelectorAll('h1,h2,p,th,td,figcaption,li')].map(
  found => [found.textContent.slice(0, 40), colour(getComputedStyle(found).color)]);
const labels = [...document.querySelectorAll('svg text')].map(
  found => [found.textContent, colour(getComputedStyle(found).fill)]);
const marks = [...document.querySelectorAll('svg path.curve, svg rect')].map(found => {
  const style = getComputedStyle(found);
  return [found.className.baseVal, colour(found.tagName == 'path' ? style.stroke : style.fill)];
});
const inside = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1
  && inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
const charts = [...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const words = [...svg.querySelectorAll('text')].map(found => [found.textContent, found.getBoundingClientRect()]);
  const over = [];
  words.forEach(([text, one], at) => words.slice(at + 1).forEach(([other, two]) => {
    if (one.left < two.right - 1 && two.left < one.right - 1 && one.top < two.bottom - 1 && two.top < one.bottom - 1)
      over.push([text, other]);
  }));
  return {width: box.width, height: box.height, over, smallest: Math.min(...words.filter(([text]) => text.length > 1)
    .map(([, found]) => Math.min(found.width, found.height))),
    outside: words.filter(([, found]) => !inside(found, box)).map(([text]) => text),
    marks: svg.querySelectorAll('path.curve, rect').length};
});
const measured = {
  back, texts, labels, marks, charts,
  tables: document.querySelectorAll('table').length,
  fetched: performance.getEntriesByType('resource').map(found => found.name),
  wide: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
  mode: document.compatMode,
};
const result = document.createElement('pre');
result.id = 'measured';
result.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(measured))));
document.body.appendChild(result);
});
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A plan's page and a replay's."""
    directory = tmp_path_factory.mktemp("reports")
    made = {}
    for name, words in {
        "plan": ["plan", "--requests", "300"],
        "replay": ["replay", "--quiet", "--requests", "60", "--donors", "1", "--scale", "65536", "--pace", "200"],
    }.items():
        path = directory / f"{name}.html"
        done = run(CLI, *words, "--trace", CHAT, "--report", path)
        assert done.returncode == 0, done.stderr
        made[name] = path.read_text()
    return made


@pytest.fixture
def look(tool, tmp_path):
    """What a browser measures in a page."""

    def call(page, scheme="light", width=1280):
        path = tmp_path / "page.html"
        path.write_text(page.replace("</body>", f"<script>{MEASURE}</script></body>"))
        libraries = library_path(tool.path)
        environment = {**CLEAN, "LD_LIBRARY_PATH": os.pathsep.join(libraries)} if libraries else CLEAN
        flags = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
                 f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size={width},900",
                 f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000", "--dump-dom"]
        done = subprocess.run([tool.path, *flags, f"file://{path}"], capture_output=True, text=True, timeout=300,
                              env=environment)
        found = re.search(r'<pre id="measured">([A-Za-z0-9+/=]+)</pre>', done.stdout)
        assert found, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
        return json.loads(base64.b64decode(found[1]))

    return call


def luminance(colour):
    parts = [value / 255 for value in colour]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def faults(seen, scheme):
    """What a reader could not read or see, a line each."""
    if seen["mode"] != "CSS1Compat":
        yield "quirks mode"
    if seen["fetched"]:
        yield f"it fetches {seen['fetched']}"
    if (luminance(seen["back"]) < 0.2) != (scheme == "dark"):
        yield f"its background is {seen['back']} where the reader wants it {scheme}"
    if seen["wide"] > seen["room"]:
        yield f"it is {seen['wide']} pixels wide, and the window {seen['room']}"
    for kind, least in (("texts", TEXT_CONTRAST), ("labels", TEXT_CONTRAST), ("marks", CHART_CONTRAST)):
        for what, colour in seen[kind]:
            if contrast(colour, seen["back"]) < least:
                yield f"{what!r} is {colour} on {seen['back']}"
    if not seen["charts"] or not seen["tables"]:
        yield "a chart or a table is missing"
    for number, chart in enumerate(seen["charts"]):
        if chart["width"] < 300 or chart["height"] < 100 or not chart["marks"]:
            yield f"chart {number} shows nothing: {chart}"
        if chart["smallest"] < 8:
            yield f"chart {number} has labels of {chart['smallest']} pixels"
        for what in ("outside", "over"):
            if chart[what]:
                yield f"chart {number} has labels {what} it: {chart[what]}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["plan", "replay"])
@pytest.mark.tool("chromium")
def test_a_reader_sees_the_report(look, pages, name, scheme, width):
    seen = look(pages[name], scheme, WIDTHS[width])
    assert list(faults(seen, scheme)) == []


@pytest.mark.parametrize("change, expected", [
    (lambda page: page.replace("prefers-color-scheme: dark", "prefers-color-scheme: none"), "wants it dark"),
    (lambda page: page.replace("--dim: #9aa5b8", "--dim: #2a3140"), "is [42, 49, 64] on"),
    (lambda page: page.replace("--c0: #6ea8ff", "--c0: #101010"), "is [16, 16, 16] on"),
    (lambda page: page.replace("</main>", "<p style='width: 3000px'>wide</p></main>"), "pixels wide"),
    (lambda page: page.replace("<main>", "<main><img src='http://127.0.0.1:9/x.png'>"), "it fetches"),
    (lambda page: page.replace('class="curve', 'class="none'), "marks"),
    (lambda page: page.replace('text-anchor="end"', 'text-anchor="start" dx="-90"'), "outside"),
    (lambda page: page.replace("font: 12px", "font: 60px"), "over"),
    (lambda page: page.replace("font: 12px", "font: 3px"), "pixels"),
    (lambda page: page.replace("<!DOCTYPE html>", ""), "quirks"),
], ids=["no-dark", "dim-text", "dim-curve", "too-wide", "fetches", "no-curves", "labels-cut", "labels-overlap", "labels-tiny", "quirks"])
@pytest.mark.tool("chromium")
def test_a_page_that_cannot_be_read_is_noticed(look, pages, change, expected):
    """The twins: each fault is seen by the browser that finds none above."""
    broken = change(pages["plan"])
    assert broken != pages["plan"]
    found = list(faults(look(broken, "dark"), "dark"))
    assert any(expected in fault for fault in found), found
