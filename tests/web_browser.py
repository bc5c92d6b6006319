"""A headless browser and axe-core for tests of pages; what needs them is skipped where they are not at hand.

A browser is any Chromium or Chrome on the path; `pip install playwright axe-playwright-python` brings what drives it
and the accessibility checker.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DESK = {"viewport": {"width": 1280, "height": 800}}


@contextlib.contextmanager
def open_browser():
    """A browser; skips the test without one."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium or Chrome on the path")
    with playwright.sync_playwright() as driver:
        # Chromium refuses to sandbox itself for the administrator, as whom containers run.
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def until(page, expression, seconds=10):
    """Waits until an expression is true; asked for from outside, as a page's own policy forbids `eval` in it."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def serious_faults(page):
    """What axe-core finds on a page that is serious or critical: rule and elements."""
    package = pytest.importorskip("axe_playwright_python")
    script = Path(package.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    # Through the debugger, which a page's own policy does not bind.
    page.evaluate(script)
    found = json.loads(page.evaluate("async () => JSON.stringify((await axe.run()).violations)"))
    return [
        (fault["id"], [node["html"][:120] for node in fault["nodes"]])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]
