"""The report in a browser, without a network: every chart is drawn, hovers, switches and fits the screen.

Needs Chromium (or Chrome) on the PATH: `apt-get install chromium`. Where there is none the tests are skipped,
with a warning.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from report_cases import HOSTILE, at, make_run, write_lines

from albor.report.command import write_report

pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api")

CHARTS = (
    "loss",
    "bits",
    "lr",
    "norm",
    "heat",
    "speed",
    "mfu",
    "process",
    "memory",
    "shares",
    "timeline",
    "tasks",
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Every text is as far from what is behind it as WCAG 2 asks of small text (AA): 4.5 to 1.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
  };
  const low = [];
  for (const element of document.body.querySelectorAll("*:not(script)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const text = element.namespaceURI.endsWith("svg") ? "fill" : "color";
    const ink = light(parse(getComputedStyle(element)[text])), paper = light(behind(element));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) low.push(`${element.tagName} ${element.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""
MARKS = """(id) => document.getElementById(`chart-${id}`).querySelectorAll(
  ".scatterlayer .js-line, .scatterlayer .point, .heatmaplayer image, .barlayer .point path").length"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        reason = f"no browser: none of {', '.join(names)} is on the PATH; run: apt-get install chromium"
        warnings.warn(f"the report was not looked at: {reason}", stacklevel=1)
        pytest.skip(reason)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three reports: `one` run, `three`, and a `bare` one without a row."""
    directory = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(directory / "runs" / "base", rows=120, text=HOSTILE),
        make_run(directory / "runs" / "higher-lr", rows=90, seed=2, overrides=("optimizer.lr=6e-4",)),
        make_run(directory / "runs" / "cpu", rows=40, seed=3, config="quickstart", device="cpu", times=False),
    ]
    bare = directory / "runs" / "bare"
    bare.mkdir()
    write_lines(bare / "events.jsonl", [{"event": "started", "step": 0, "time": at(0)}])
    write_report(runs[:1], directory / "one.html")
    write_report(runs, directory / "three.html")
    write_report([bare], directory / "bare.html")
    return directory


@contextmanager
def opened(browser: Any, page: Path, *, width: int = 1600, scheme: str = "light") -> Iterator[Any]:
    """The page when all is drawn. To the end of the block it has asked for nothing and had no error."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]", state="attached")
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    if folder := os.environ.get("ALBOR_TEST_SCREENSHOTS"):
        tab.screenshot(path=f"{folder}/{page.stem}-{scheme}-{width}.png", full_page=True)
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1600, "light"), (400, "dark")])
def test_every_chart_is_drawn_legible_and_on_the_screen(browser: Any, pages: Path, width: int, scheme: str):
    with opened(browser, pages / "three.html", width=width, scheme=scheme) as tab:
        assert [name for name in CHARTS if not tab.evaluate(MARKS, name)] == []
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.evaluate(CONTRAST) == []
        titles = "[...new Set([...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title))]"
        assert set(tab.evaluate(titles)) == {"Zoom in", "Zoom out", "Zoom", "Pan", "Download plot"}
        if width == 400:
            return
        other = {"light": "dark", "dark": "light"}[scheme]
        before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.check(f"input[name=theme][value={other}]", force=True)
        settle(tab)
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert tab.evaluate(CONTRAST) == []


def settle(tab: Any) -> None:
    """Until what was asked of the charts is drawn."""
    tab.evaluate("() => window.alborReport.drawn()")


def title_of(tab: Any, chart: str) -> str:
    return tab.text_content(f"#chart-{chart} .xtitle")


def range_of(tab: Any, chart: str) -> list[float]:
    return tab.evaluate("(id) => document.getElementById(id)._fullLayout.xaxis.range", f"chart-{chart}")


def test_mouse_and_keys_are_answered(browser: Any, pages: Path):
    with opened(browser, pages / "one.html") as tab:
        box = tab.locator("#chart-loss .nsewdrag").bounding_box()
        tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tab.wait_for_selector("#chart-loss .hoverlayer .legendtext")
        hover = " ".join(tab.locator("#chart-loss .hoverlayer .legendtext").all_text_contents())
        assert "training: 2." in hover
        tab.focus("#chart-bits")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        spoken = tab.text_content("#spoken")
        series = tab.evaluate("JSON.parse(document.getElementById('data').textContent).runs[0].series")
        bits = series["val/bits_per_byte"]
        assert spoken == f"{bits['s'][1] * 131072:,} tokens: held-out {bits['y'][1]:.4f}"

        with tab.expect_download() as download:
            tab.click("#chart-loss [data-title='Download plot']")
        assert Path(download.value.path()).read_text().startswith("<svg")

        # A stretch that is drawn with the mouse is shown by all.
        whole = range_of(tab, "loss")
        box = tab.locator("#chart-loss .nsewdrag").bounding_box()
        middle = box["y"] + box["height"] / 2
        tab.mouse.move(box["x"] + box["width"] * 0.25, middle)
        tab.mouse.down()
        tab.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
        tab.mouse.up()
        settle(tab)
        low, high = range_of(tab, "speed")
        assert high - low == pytest.approx((whole[1] - whole[0]) / 4, rel=0.02)
        tab.dblclick("#chart-loss .nsewdrag")
        settle(tab)
        assert range_of(tab, "speed") == range_of(tab, "loss") == whole

        # Samples are turned over, and those that look like markup are text.
        last = tab.inner_text(".sample-step:not(.hidden) h3")
        tab.click("#sample-before")
        assert tab.locator(".sample-step:not(.hidden)").count() == 1
        assert tab.inner_text(".sample-step:not(.hidden) h3") != last
        assert HOSTILE in tab.inner_text(".sample-step:not(.hidden) pre >> nth=0")
        assert tab.title() == "base: albor report"
        tab.select_option("#heat-part", "mlp")
        settle(tab)
        assert tab.evaluate(MARKS, "heat")


def test_the_switches_act_on_all_charts_over_the_run(browser: Any, pages: Path):
    with opened(browser, pages / "three.html") as tab:
        assert title_of(tab, "loss") == title_of(tab, "timeline") == "tokens"
        tab.check("input[name=axis][value=h]", force=True)
        settle(tab)
        assert {title_of(tab, name) for name in ("loss", "bits", "heat", "timeline")} == {"hours of training"}
        whole = range_of(tab, "loss")
        assert whole == range_of(tab, "speed")
        tab.check("input[name=y-scale][value=log]", force=True)
        settle(tab)
        kinds = "(ids) => ids.map((id) => document.getElementById(id)._fullLayout.yaxis.type)"
        assert tab.evaluate(kinds, ["chart-loss", "chart-speed"]) == ["log", "linear"]
        tab.focus("#chart-loss")
        tab.keyboard.press("+")
        settle(tab)
        near = range_of(tab, "loss")
        assert near[1] - near[0] == pytest.approx((whole[1] - whole[0]) / 2)
        assert range_of(tab, "timeline") == range_of(tab, "heat") == near
        tab.click("#whole")
        settle(tab)
        assert range_of(tab, "norm") == whole
        traces = "(id) => document.getElementById(id).data.length"
        before = tab.evaluate(traces, "chart-lr")
        tab.click(".runs button[data-run='1']")
        settle(tab)
        assert tab.get_attribute(".runs button[data-run='1']", "aria-pressed") == "false"
        assert tab.evaluate(traces, "chart-lr") == before - 1 == 2


def test_a_page_with_nothing_measured_has_no_empty_chart(browser: Any, pages: Path):
    with opened(browser, pages / "bare.html", width=400) as tab:
        assert tab.locator(".chart").count() == 1
        assert tab.evaluate(MARKS, "timeline") == 1
        assert tab.is_disabled("input[name=axis][value=h]")


def test_print_is_ink_on_paper(browser: Any, pages: Path):
    with opened(browser, pages / "one.html", scheme="dark") as tab:
        tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        tab.emulate_media(media="print")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not tab.is_visible(".controls")
        ink = tab.evaluate("getComputedStyle(document.querySelector('#chart-loss .xtitle')).fill")
        assert ink == "rgb(22, 25, 29)"
        assert tab.locator("#chart-loss .main-svg").first.bounding_box()["width"] == 660
        tab.emulate_media(media="screen")
        tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
        settle(tab)
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
