"""The fixed prompts' images: before, after and the steps between, from the same initial noise."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from etils import epath

from marble_jax.report import blocks, document
from marble_jax.report.markup import element
from marble_jax.report.records import Records, Strip

Image = tuple[int, epath.Path]
"""Step and file."""
MAX_PROMPTS = 12
MAX_BETWEEN = 4
"""Images of a prompt between its first and its last: more would make the page large and the row hard to follow."""


def images(records: Records, flaws: list[str]) -> str:
    """Returns the fixed prompts before and after, and folded below them the steps between.

    Args:
      records: of the run.
      flaws: gets a sentence for each unreadable file.
    """
    title = "Same prompt, same seed"
    # A prompt of the list has no image before its first evaluation is over.
    strips = [strip for strip in records.strips if strip.images]
    if not strips:
        message = "No sample images yet. They appear under <code>samples/</code> with the first evaluation."
        return blocks.section("images", title, blocks.absent(message))
    shown = strips[:MAX_PROMPTS]
    cards, timelines = [], []
    for strip in shown:
        cards.append(_card(strip, flaws))
        # With two images or fewer there is nothing between them.
        if len(strip.images) > 2:
            timelines.append(_timeline(strip, flaws))
    between = ""
    if timelines:
        between = blocks.fold("The steps between", *timelines)
    lead = _lead(shown, len(strips))
    return blocks.section(
        "images", title, element("div", *cards, class_="cards"), between, lead=lead
    )


def _lead(shown: Sequence[Strip], num_strips: int) -> str:
    count = ""
    if len(shown) < num_strips:
        count = f" The first {len(shown)} of {num_strips} prompts."
    num_images = max(len(strip.images) for strip in shown)
    if num_images == 1:
        return f"Images of one step only so far; the next evaluation adds the comparison.{count}"
    return (
        "Left the base model, right the latest evaluated weights, from the same initial noise. The "
        f"prompts are the run's fixed list, in its order.{count}"
    )


def _card(strip: Strip, flaws: list[str]) -> str:
    """Returns a prompt's first and last image with its text."""
    ends = [strip.images[0]]
    if len(strip.images) > 1:
        ends.append(strip.images[-1])
    cells = [_image_at(strip, image, flaws) for image in ends]
    seed = ""
    if strip.seed is not None:
        seed = " " + element("span", f"seed {strip.seed}", class_="seed")
    return element(
        "figure",
        element("div", *cells, class_="pair"),
        element("figcaption", escape(strip.prompt), seed),
        class_="card",
    )


def _timeline(strip: Strip, flaws: list[str]) -> str:
    """Returns some of a prompt's images between the first and the last."""
    cells = [_image_at(strip, image, flaws) for image in _between(strip.images)]
    row = element("div", *cells, class_="row")
    return element(
        "figure",
        element("figcaption", escape(strip.prompt)),
        element("div", row, class_="scroll", role="group", aria_label="Steps", tabindex=0),
        class_="timeline",
    )


def _between(images: Sequence[Image]) -> list[Image]:
    """Returns up to MAX_BETWEEN entries, evenly from the inside of `images`."""
    inner = list(images[1:-1])
    if len(inner) <= MAX_BETWEEN:
        return inner
    positions = np.linspace(0, len(inner) - 1, MAX_BETWEEN)
    return [inner[round(position)] for position in positions]


def _image_at(strip: Strip, image: Image, flaws: list[str]) -> str:
    step, path = image
    # Step 0 is evaluated before the first update, when the adapter is still zero.
    moment = "base" if step == 0 else f"step {step:,}"
    embedded = document.inline(path, f"Step {step}: {strip.prompt}", flaws)
    points = blocks.image_scores(strip.scores.get(step, {}))
    return element("div", embedded, element("span", moment, class_="when"), points)
