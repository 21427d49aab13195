"""The pages in a real browser: quiet, without a network, on a phone and on a desk, in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from fp8rl.environment import environment
from fp8rl.report.data import RunData
from fp8rl.report.run_page import run_page
from fp8rl.report.summary import result, write_comparison
from tests.fp8rl.report_runs import COMMAND, make_run

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser, one of {', '.join(NAMES)}: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, and of three side by side."""
    root = tmp_path_factory.mktemp("pages")
    run = make_run(root / "fp8")
    run.write_result(result(run, command=COMMAND, environment=environment()))
    arms = [run, *(make_run(root / f"{s}", rollout={"precision": "bf16"}, seed=s) for s in (0, 1))]
    several = write_comparison([arm.path for arm in arms], root / "comparison.html")
    alone = root / "report.html"
    alone.write_text(run_page(RunData.load(run.path)))
    return {"one": alone, "several": several}


@dataclass
class Seen:
    """An open page, what it said on its console, and what it asked the network for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(params=["one", "several"])
def seen(
    request: pytest.FixtureRequest, browser: Browser, pages: dict[str, Path]
) -> Iterator[Seen]:
    page = browser.new_page(viewport=PHONE)
    found = Seen(page)
    page.on("console", lambda message: found.said.append(message.text))
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.route(
        lambda url: not url.startswith(("file:", "data:")),
        lambda route: (found.asked.append(route.request.url), route.abort()),
    )
    page.goto(pages[request.param].as_uri())
    yield found
    page.close()


def test_it_is_quiet_and_asks_the_network_for_nothing(seen: Seen) -> None:
    assert (seen.said, seen.asked) == ([], [])
    seen.page.evaluate("fetch('http://example.org/').catch(() => {})")  # would be seen
    seen.page.wait_for_function("true")
    assert seen.asked == ["http://example.org/"]


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_verdict_and_gains_are_on_the_first_screen(seen: Seen, size: dict[str, int]) -> None:
    seen.page.set_viewport_size(size)
    for part in (seen.page.locator(".answer .word"), seen.page.locator(".fact").first):
        box = part.bounding_box()
        assert box is not None
        assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
        assert box["y"] >= 0 and box["y"] + box["height"] <= size["height"]


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_is_wider_than_the_screen_with_everything_open(
    seen: Seen, size: dict[str, int]
) -> None:
    seen.page.set_viewport_size(size)
    seen.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    width = seen.page.evaluate("document.documentElement.scrollWidth")
    assert width == size["width"]


def test_a_click_opens_where_a_number_comes_from(seen: Seen) -> None:
    fact = seen.page.locator(".fact").first
    source = fact.locator("dl")
    assert not source.is_visible()
    fact.locator("summary").click()
    assert source.is_visible()
    assert "metrics.jsonl" in source.inner_text()


def test_the_text_of_figures_is_text_and_legible_in_the_dark(seen: Seen) -> None:
    label = seen.page.locator("figure svg text").first
    assert label.text_content()

    def colours() -> list[str]:
        ink = label.evaluate("e => getComputedStyle(e).fill")
        return [ink, seen.page.evaluate("getComputedStyle(document.body).backgroundColor")]

    assert colours() == ["rgb(27, 27, 31)", "rgb(255, 255, 255)"]
    seen.page.emulate_media(color_scheme="dark")
    assert colours() == ["rgb(236, 236, 240)", "rgb(20, 20, 23)"]
