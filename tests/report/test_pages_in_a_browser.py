"""The report's pages in a real browser: with a keyboard, on a phone, on paper, and what axe-core finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from make_workdir import make_workdir
from web_browser import DESK, PHONE, open_browser, serious_faults

from marble_jax.report import read_records, summarise, write_comparison, write_report
from marble_jax.storage.images import save_sample

# Words that are broken: their letters lie on more than one line, though they have no place to break at.
BROKEN = """() => {
  const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (parent.closest('script, style, svg, [hidden], dialog, .skip, pre') || !parent.checkVisibility()) continue;
    for (const match of node.data.matchAll(/[A-Za-z0-9.,]{2,30}/g)) {
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
      if (lines.size > 1 && getComputedStyle(parent).writingMode === 'horizontal-tb') broken.push(match[0]);
    }
  }
  return broken;
}"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with another run beside it, scores under images, and a clip."""
    root = make_workdir(tmp_path_factory.mktemp("report") / "run", num_steps=20, evaluate_every=5)
    other = make_workdir(root.parent / "other", num_steps=16, images=False, compare=False)
    (root / "compare" / "other.json").write_text(json.dumps(summarise(read_records(other))))
    for folder in (root / "samples").glob("step_*"):
        scores = [{"geneval": 0.5, "ocr": None, "a_reward_with_a_long_name": 21.25}] * 6
        (folder / "scores.json").write_text(json.dumps(scores))
        save_sample(folder / "05.png", np.zeros((4, 8, 8, 3), np.uint8), {}, 8)
    return str(write_report(root))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The page of an evaluation before it is scored, of four models."""
    root = tmp_path_factory.mktemp("evaluation")
    models = {name: {"source": {"model": "x"}} for name in ("base", "lora-a", "lora-b", "lora-c")}
    (root / "evaluation.json").write_text(json.dumps({"models": models, "num_images": 1}))
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": "two cats", "source": "s"}) + "\n")
    for name in models:
        save_sample(root / name / "00000.png", np.zeros((8, 8, 3), np.uint8))
        line = {"index": 0, "scores": {"ocr": 0.5, "geneval": None}}
        (root / name / "scores.jsonl").write_text(json.dumps(line) + "\n")
    return str(write_comparison(root))


def open_page(browser, file, view):
    page = browser.new_context(**view).new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text))
    page.goto(f"file://{file}")
    return page


@pytest.mark.parametrize(
    "view", [DESK, DESK | {"color_scheme": "dark"}, PHONE], ids=["desk", "dark", "phone"]
)
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_nothing_serious_is_found_and_nothing_scrolls_sideways(browser, request, which, view):
    page = open_page(browser, request.getfixturevalue(which), view)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert serious_faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= view["viewport"]["width"]
    assert not page.errors
    page.context.close()


def test_wide_tables_are_stops_of_the_tab_key_where_they_scroll(browser, report):
    stops = "[...document.querySelectorAll('.scroll[tabindex]')].map((box) => box.getAttribute('aria-label'))"
    page = open_page(browser, report, PHONE)
    assert any(label.startswith("Table: Run, Method") for label in page.evaluate(stops))
    page.context.close()
    page = open_page(browser, report, DESK)
    assert not any(label.startswith("Table: Run, Method") for label in page.evaluate(stops))
    page.context.close()


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_images_are_enlarged_by_key_and_by_click(browser, request, which):
    page = open_page(browser, request.getfixturevalue(which), DESK)
    image = page.locator(".pair img").first
    width = image.bounding_box()["width"]
    image.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog img").first.bounding_box()["width"] > width
    # Together with what it is compared with, and with its scores.
    assert page.locator("dialog img").count() == page.locator(".pair").first.locator("img").count()
    assert page.locator("dialog .points").count() > 0
    assert serious_faults(page) == []
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    image.click()
    page.click("dialog button")
    assert not page.locator("dialog").is_visible()
    page.context.close()


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_no_word_is_broken_on_paper(browser, request, which):
    # The width of A4 less its margins, in CSS pixels.
    page = open_page(
        browser, request.getfixturevalue(which), {"viewport": {"width": 688, "height": 1000}}
    )
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.emulate_media(media="print")
    assert page.evaluate(BROKEN) == []
    page.context.close()
