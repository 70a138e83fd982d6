"""report.html in a browser: films play, the slider moves, nothing is loaded."""

import os
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
from test_report import MOMENT, play, results

from trm_helpers.files import write_json
from trm_helpers.report import page as report_page
from trm_helpers.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
OPTIONS = ["--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync",
           *(["--no-sandbox"] if os.geteuid() == 0 else [])]

pytestmark = pytest.mark.skipif(not CHROMIUM, reason=f"none of {', '.join(BROWSERS)} is installed")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "report.html"


@pytest.fixture
def page(kept, request):
    """The page of a run with episodes, a failure's film and moments; the first test makes it."""
    if not kept.exists():
        shutil.copyfile(page_of(request.getfixturevalue("trained")), kept)
    return kept


def page_of(trained):
    play(trained, {(0, 0): True, (0, 1): False, (0, 2): True}, filmed=[(0, 0), (0, 1)])
    write_json(trained / "results.json", results(9))
    write_json(trained / "explain.json", {"sentences": ["It has converged."],
                                          "moments": [MOMENT, {**MOMENT, "title": "end"}]})
    (trained / "figures").mkdir()
    for name in ("07_moments.png", "07_saliency.png"):
        imageio.imwrite(trained / "figures" / name, np.full((64, 128, 3), 90, np.uint8))
    path = write_report(trained)
    assert path.stat().st_size < report_page.MAX_BYTES
    return path


@pytest.fixture
def opened(chromium, page):
    """A function: the page in a window of its own.

    Afterwards, nothing was requested but the file, and the browser reported no error.
    """
    requested, errors, contexts = [], [], []

    def open_window(**look):
        contexts.append(chromium.new_context(**look))
        window = contexts[-1].new_page()
        window.on("request", lambda request: requested.append(request.url))
        window.on("console", lambda message: errors.append(message.text))
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.goto(page.as_uri())
        return window

    yield open_window
    for context in contexts:
        context.close()
    assert errors == []
    assert {url for url in requested if not url.startswith("data:")} == {page.as_uri()}


PLAYS = """element => new Promise(done => {
  const seen = () => element.currentTime > 0 && !element.paused;
  const timer = setInterval(() => { if (seen()) { clearInterval(timer); done(true); } }, 50);
})"""


def test_a_click_on_an_episode_plays_its_film(opened):
    window = opened()
    tile = window.locator(".tile.failure")
    tile.click()
    figure = window.locator(".episode:visible")
    assert figure.count() == 1 and "Failure: not solved within 14.0 s" in figure.inner_text()
    assert figure.locator("video").evaluate(PLAYS)
    assert figure.locator("video").evaluate("element => element.videoWidth") == 64
    assert "reach 3.0 s" in figure.inner_text() and tile.get_attribute("aria-expanded") == "true"
    window.locator(".tile").last.click()  # one that was not filmed, in its place
    assert "Not filmed" in window.locator(".episode:visible").inner_text()
    window.locator(".tile").last.click()
    assert window.locator(".episode:visible").count() == 0


def test_the_film_of_the_task_plays(opened):
    hero = opened().locator("#hero")
    hero.evaluate("element => { element.play(); }")
    assert hero.evaluate(PLAYS)


def test_the_keyboard_does_what_the_mouse_does(opened):
    window = opened()
    window.locator("summary").first.focus()  # the table above the tiles
    for key in ("Tab", "ArrowRight", "Enter"):
        window.keyboard.press(key)
    assert "init state 1" in window.locator(".episode:visible").inner_text()
    window.keyboard.press("Escape")
    assert window.locator(".episode:visible").count() == 0
    assert window.locator(".tile[aria-expanded=false]").count() == window.locator(".tile").count()
    assert window.locator(".tile[tabindex='0']").get_attribute("aria-label").startswith(
        "Init state 1")
    for _ in range(3):  # beyond the task's last tile, which stays the one that Tab reaches
        window.keyboard.press("ArrowRight")
    (last,) = window.locator(".tile[tabindex='0']").all()
    assert last.evaluate("element => element === document.activeElement")
    assert last.get_attribute("aria-label").startswith("Init state 2")
    window.locator("#step").focus()
    window.keyboard.press("ArrowRight")
    assert window.locator("#sentence").inner_text() == "two"
    for _ in range(2):  # the last moment's button, then the slider
        window.keyboard.press("Shift+Tab")
    window.keyboard.press("Enter")
    assert window.locator(".tabs [aria-pressed=true]").count() == 1


def test_tab_reaches_one_tile_of_a_task_also_after_a_click(opened):
    window = opened()
    window.locator(".tile").nth(1).click()
    window.keyboard.press("ArrowRight")
    (reached,) = window.locator(".tile:not([tabindex='-1'])").all()
    assert reached.get_attribute("aria-label").startswith("Init state 2")


def test_escape_in_a_film_returns_to_its_tile(opened):
    window = opened()
    tile = window.locator(".tile.failure")
    tile.click()
    window.locator(".episode:visible video").focus()
    window.keyboard.press("Escape")
    assert window.locator(".episode:visible").count() == 0
    assert tile.evaluate("element => element === document.activeElement")


def test_tables_are_unfolded_on_paper_and_folded_again(opened):
    window = opened()
    folded = window.locator("details:not([open])")
    before = folded.count()
    assert before > 1
    window.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert window.get_by_role("cell", name="num_recursions").is_visible()
    assert all(table.is_visible() for table in window.locator("table").all())
    window.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert folded.count() == before


def test_the_slider_changes_sentence_bars_and_image(opened):
    window = opened()
    bar, sentence = window.locator("#actions i").first, window.locator("#sentence")
    wide = bar.bounding_box()["width"]
    assert sentence.inner_text() == "one" and "1 of 2" in window.locator("#at").inner_text()
    window.locator("#step").fill("2")
    assert sentence.inner_text() == "two" and "2 of 2" in window.locator("#at").inner_text()
    assert bar.bounding_box()["width"] == pytest.approx(wide / 2, abs=1)
    assert window.locator("#change-text").inner_text() == "10.0 % of the state's norm"
    window.get_by_role("button", name="end").click()
    images = window.locator(".moment")
    assert [images.nth(i).is_visible() for i in range(2)] == [False, True]


@pytest.mark.parametrize("look", [
    {}, {"color_scheme": "dark"}, {"viewport": {"width": 400, "height": 800}}],
    ids=["light", "dark", "narrow"])
def test_images_are_described_and_the_page_fits(opened, look):
    window = opened(**look)
    images = window.locator("img").evaluate_all(
        "all => all.map(image => [image.alt, image.naturalWidth])")
    assert len(images) == 4 and all(alt and width for alt, width in images)
    window.locator(".tile.failure").click()  # an episode of many phases
    across = window.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert across[0] <= across[1]
    ground = window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (look.get("color_scheme") != "dark")
