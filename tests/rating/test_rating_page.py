"""The rating page in a real browser: by keyboard, on a phone, over a reload, and while the server is away."""

from __future__ import annotations

import numpy as np
import pytest
from web_browser import DESK, PHONE, open_browser, serious_faults, until

from marble_jax.rating.anonymous_png import anonymous_png
from marble_jax.rating.ballot import PAIRS, Ballot
from marble_jax.rating.server import RatingServer
from marble_jax.rating.votes import VoteFile
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.storage.images import save_sample

MODELS = ("base", "ours", "theirs")
TEXTS = ("a red <b>star</b>", "two \u201cblue\u201d circles", "fog")
OPTIONS = ServerOptions(token="t0ken")
SHOWN = "#task:not([hidden])"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image of each model, and a clip of the last one."""
    folder = tmp_path_factory.mktemp("images")
    for number, model in enumerate(MODELS):
        shape = (3, 24, 32, 3) if model == "theirs" else (24, 32, 3)
        save_sample(folder / f"{model}.png", np.full(shape, 60 * number, np.uint8), {}, 8)
    return folder


@pytest.fixture
def serve(tmp_path, files):
    """Starts a server on a ballot; all are closed at the end."""
    running = []

    def start(ballot, port=0):
        def image(model, index):
            return anonymous_png((files / f"{model}.png").read_bytes(), "image")

        votes = VoteFile(tmp_path / "votes.jsonl", ballot)
        running.append(RatingServer(ballot, votes, image, OPTIONS, port=port))
        return running[-1], votes

    yield start
    for server in running:
        server.close()


def open_page(browser, url, name, view):
    page = browser.new_context(**view).new_page()
    page.set_default_timeout(10_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    if name:
        page.fill("#rater", name)
        page.keyboard.press("Enter")
        page.wait_for_selector(SHOWN)
    return page


def saved(page, votes, count):
    """Waits until so many votes are on file."""
    until(page, "unsent.length === 0 && !sending")
    assert len(list(votes.items())) == count


def test_a_keyboard_alone_is_enough_and_a_reload_loses_nothing(browser, serve):
    ballot = Ballot(MODELS, TEXTS)
    server, votes = serve(ballot)
    page = open_page(browser, server.url, "", DESK)
    assert serious_faults(page) == []
    page.keyboard.type("Ann")
    page.keyboard.press("Enter")
    page.wait_for_selector(SHOWN)
    assert serious_faults(page) == []
    prompt = page.text_content("#prompt")
    # Shown as text: no markup of a prompt becomes the page's.
    assert prompt in TEXTS and page.query_selector("#prompt b") is None
    for key in "123451":
        page.keyboard.press(key)
    saved(page, votes, 6)
    assert page.text_content("#counted") == "1 of 3"
    shown = ballot.shown_order("Ann", 0, MODELS)
    grades = {(s.models[0], s.question): v for s, v in votes.items()}
    assert [grades[m, q] for m in shown for q in ballot.questions] == [1, 2, 3, 4, 5, 1]
    page.keyboard.press("Enter")
    until(page, "current && current.task === 1")
    page.keyboard.press("4")
    saved(page, votes, 7)
    page.reload()
    page.wait_for_selector(SHOWN)
    assert page.evaluate("current.task") == 1 and page.locator(":checked").count() == 1
    page.keyboard.press("Backspace")
    until(page, "current && current.task === 0")
    assert page.locator(":checked").count() == 6
    assert not page.errors
    page.context.close()


def test_a_phone_votes_by_touch_without_scrolling_sideways(browser, serve):
    server, votes = serve(Ballot(MODELS, TEXTS))
    page = open_page(browser, server.url, "Bob", PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.eval_on_selector_all(
        ".choices label", "all => all.map(e => [e.offsetWidth, e.offsetHeight])"
    )
    assert all(width >= 24 and height >= 44 for width, height in sizes)
    page.tap("#images figure:nth-child(2) fieldset:nth-of-type(2) label:nth-child(5)")
    saved(page, votes, 1)
    ((subject, value),) = votes.items()
    shown = Ballot(MODELS, TEXTS).shown_order("Bob", 0, MODELS)
    assert (subject.models, subject.question, value) == ((shown[1],), "quality", 5)
    page.tap(".frame >> nth=0")
    assert page.is_visible("#large")
    page.tap("#shrink")
    assert serious_faults(page) == [] and not page.errors
    page.context.close()


def test_pairs_to_the_end(browser, serve):
    ballot = Ballot(MODELS[:2], TEXTS, PAIRS, ("overall",))
    server, votes = serve(ballot)
    page = open_page(browser, server.url, "Cy", DESK | {"color_scheme": "dark"})
    assert serious_faults(page) == []
    for number, key in enumerate("123"):
        until(page, f"current && current.task === {number}")
        page.wait_for_selector("fieldset :focus")
        page.keyboard.press(key)
        page.keyboard.press("Enter")
    page.wait_for_selector("#end:not([hidden])")
    saved(page, votes, 3)
    cast = {subject.index: value for subject, value in votes.items()}
    for number, (task, place) in enumerate(zip(ballot.tasks(), (0, None, 1))):
        shown = ballot.shown_order("Cy", number, task.models)
        assert cast[task.index] == ("alike" if place is None else shown[place])
    assert serious_faults(page) == [] and not page.errors
    page.context.close()


def test_votes_wait_for_a_server_that_is_away(browser, serve):
    ballot = Ballot(MODELS, TEXTS)
    server, votes = serve(ballot)
    page = open_page(browser, server.url, "Di", DESK)
    server.close()
    page.keyboard.press("2")
    page.wait_for_selector("#status.bad")
    assert "1 vote(s) not sent yet" in page.text_content("#status")
    _, votes = serve(ballot, server.server_port)
    until(page, "unsent.length === 0 && !sending")
    assert [value for _, value in votes.items()] == [2]
    page.context.close()


def test_an_address_without_its_token_says_so(browser, serve):
    server, _ = serve(Ballot(MODELS, TEXTS))
    page = open_page(browser, server.url.partition("#")[0], "", DESK)
    assert "ends with # and a token" in page.text_content("#reason")
    page.goto("about:blank")
    page.goto(server.url + "x")
    page.fill("#rater", "Eve")
    page.keyboard.press("Enter")
    page.wait_for_selector("#closed:not([hidden])")
    assert "token: expected" in page.text_content("#reason")
    page.context.close()
