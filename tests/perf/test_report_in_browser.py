"""Reports as a real Chromium shows them: light, dark, narrow and printed; without the network, with nothing cut off.

Without a browser these tests are skipped; with CI=true they fail. ``make browser`` installs one.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import report_cases
from playwright.sync_api import Browser, Page, sync_playwright

from enginesmith_client.perf.report._report import html

Scheme = Literal["light", "dark"]
Decode = Callable[[bytes], dict[str, Any]]
CASES: dict[str, Callable[[Path], object]] = {
    "run": report_cases.good_run,
    "troubled": report_cases.troubled_run,
    "void": report_cases.void_run,
    "sweep": report_cases.a_sweep,
    "suite": report_cases.a_suite,
    "comparison": report_cases.a_comparison,
}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDE, NARROW, PAPER = 1280, 480, 794
"""CSS pixels; the last is the width of A4."""

CONTRASTS = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const luminance = colour => {
    const [r, g, b] = colour.map(value => value / 255).map(
      value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || element.tagName === 'title' || element.closest('.unseen')) continue;
    const below = background(element);
    const ink = over(rgba(element.namespaceURI.endsWith('svg') ? style.fill : style.color), below);
    const [dark, light] = [luminance(ink), luminance(below)].sort((one, other) => one - other);
    found.push({text: node.data.trim().slice(0, 40), ratio: (light + 0.05) / (dark + 0.05)});
  }
  return found;
}"""
BEYOND = """() => {
  const wide = document.documentElement.clientWidth;
  return [...document.querySelectorAll('svg.chart, svg.chart text, h1, h2, p, li, dd, figure, table')]
    .filter(one => !one.closest('.table') || one.tagName === 'DIV')
    .map(one => [one.tagName, one.textContent.trim().slice(0, 40), one.getBoundingClientRect()])
    .filter(([, , box]) => box.left < -0.5 || box.right > wide + 0.5)
    .map(([tag, text, box]) => `${tag} ${text}: ${box.left} to ${box.right} of ${wide}`);
}"""
CUT = """() => [...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()])
    .filter(([, box]) => box.left < frame.left - 2 || box.right > frame.right + 2 || box.bottom > frame.bottom + 2)
    .map(([text, box]) => `${text}: ${box.left} to ${box.right} of ${frame.left} to ${frame.right}`);
})"""
COLOURS = """async source => {
  const image = new Image(); image.src = source; await image.decode();
  const canvas = document.createElement('canvas'); canvas.width = image.width; canvas.height = image.height;
  const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
  const {data} = context.getImageData(0, 0, image.width, image.height), counts = new Map();
  for (let i = 0; i < data.length; i += 4) {
    const key = (data[i] << 16) | (data[i + 1] << 8) | data[i + 2];
    counts.set(key, (counts.get(key) || 0) + 1);
  }
  const [most, count] = [...counts].sort((one, other) => other[1] - one[1])[0];
  return {most: [most >> 16, (most >> 8) & 255, most & 255], share: count / (data.length / 4), different: counts.size};
}"""


def browser_program() -> str:
    """The program, or the end of the test without one."""
    given = os.environ.get("ENGINESMITH_CHROMIUM")
    found = [path for name in ([given] if given else NAMES) if (path := shutil.which(name))]
    if not found:
        reason = f"no browser: {given or ', '.join(NAMES)} not found (make browser installs one, or set ENGINESMITH_CHROMIUM)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = browser_program()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Opened:
    """A report in the browser, and what it asked for and complained about."""

    page: Page
    path: Path
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def at(
        self, *, width: int = WIDE, scheme: Scheme = "light", media: Literal["screen", "print"] = "screen"
    ) -> Page:
        """The page as it looks there."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(media=media, color_scheme=scheme)
        return self.page


@contextmanager
def opened(browser: Browser, case: str, directory: Path) -> Iterator[Opened]:
    """The report of a case, loaded."""
    CASES[case](directory)
    path = directory / "report.html"
    path.write_text(html(directory), encoding="utf-8")
    page = browser.new_page()
    shown = Opened(page, path)
    page.on("request", lambda request: shown.requests.append(request.url))
    page.on("console", lambda message: shown.complaints.append(message.text))
    page.on("pageerror", lambda error: shown.complaints.append(str(error)))
    page.goto(path.as_uri())
    yield shown
    page.close()


@pytest.fixture(scope="module", params=CASES)
def report(
    request: pytest.FixtureRequest, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    with opened(browser, request.param, tmp_path_factory.mktemp("results")) as shown:
        yield shown


@pytest.fixture(scope="module")
def decode(browser: Browser) -> Iterator[Decode]:
    """A picture, decoded by the browser: the colour of most pixels, their share, how many colours there are."""
    blank = browser.new_page()

    def colours(png: bytes) -> dict[str, Any]:
        seen: dict[str, Any] = blank.evaluate(
            COLOURS, "data:image/png;base64," + base64.b64encode(png).decode()
        )
        return seen

    yield colours
    blank.close()


def test_a_report_loads_nothing_and_complains_of_nothing(report: Opened) -> None:
    page = report.at()
    assert report.requests == [report.path.as_uri()]
    assert report.complaints == []
    assert page.evaluate("document.scripts.length") == 0
    assert page.locator("svg.chart").count() > 0


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_beyond_the_page(report: Opened, width: int) -> None:
    page = report.at(width=width)
    assert page.evaluate(BEYOND) == []
    assert page.evaluate(CUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(report: Opened, scheme: Scheme) -> None:
    contrasts = report.at(scheme=scheme).evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert [one for one in contrasts if one["ratio"] < 4.5] == []


@pytest.mark.parametrize(("scheme", "darkest", "lightest"), [("light", 235, 255), ("dark", 0, 40)])
def test_the_page_has_the_colour_of_its_scheme_and_is_not_blank(
    report: Opened, decode: Decode, scheme: Scheme, darkest: int, lightest: int
) -> None:
    seen = decode(report.at(scheme=scheme).screenshot())
    assert all(darkest <= part <= lightest for part in seen["most"])
    assert 0.3 < seen["share"] < 0.98
    assert seen["different"] > 100


def test_on_paper_a_report_is_light_and_whole_whatever_the_screen(report: Opened, decode: Decode) -> None:
    page = report.at(width=PAPER, scheme="dark", media="print")
    assert decode(page.screenshot())["most"] == [255, 255, 255]
    assert page.evaluate(BEYOND) == []
    assert page.evaluate(CUT) == []
    beyond = "[...document.querySelectorAll('table')].filter(one => one.getBoundingClientRect().right > innerWidth)"
    assert page.evaluate(f"{beyond}.length") == 0
    sheets = re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))
    assert len(sheets) >= 2


def test_charts_are_not_torn_between_two_sheets(report: Opened) -> None:
    page = report.at(media="print")
    whole = "[...document.querySelectorAll('figure')].map(one => getComputedStyle(one).breakInside)"
    assert set(page.evaluate(whole)) == {"avoid"}


def test_headings_go_down_one_step_at_a_time_and_images_have_words(report: Opened) -> None:
    page = report.at()
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    images = page.get_by_role("img")
    assert images.count() == page.locator("svg").count()
    words = images.evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert all(len(one) > 20 for one in words)


def test_a_void_run_cannot_be_overlooked(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, "void", tmp_path) as shown:
        page = shown.at()
        crossed = page.locator(".tiles s, table s")
        assert crossed.count() > 10
        lines = crossed.evaluate_all("all => all.map(one => getComputedStyle(one).textDecorationLine)")
        assert set(lines) == {"line-through"}
        stamps = (
            "[...document.querySelectorAll('.drawing')].map(one => getComputedStyle(one, '::after').content)"
        )
        assert set(page.evaluate(stamps)) == {'"VOID"'}
        verdict = page.locator(".verdict").bounding_box()
        assert verdict is not None
        assert verdict["y"] + verdict["height"] < 500, "the verdict is on the first screen"


def test_names_that_are_markup_do_nothing(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, "troubled", tmp_path) as shown:
        page = shown.at()
        assert page.title() == f"chat {report_cases.HOSTILE}"
        assert page.locator("h1").inner_text() == f"chat {report_cases.HOSTILE}"
        assert page.locator("img, script, a").count() == 0


def test_a_missing_browser_fails_where_it_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_CHROMIUM", "no-such-browser")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no browser: no-such-browser not found"):
        browser_program()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="make browser"):
        browser_program()
