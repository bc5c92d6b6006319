"""Names and prompts in a model card show as they are: they bring no link, no picture, no heading and no markup."""

from __future__ import annotations

import html
import re

import pytest

from marble_jax.programs.markdown import code, plain

HOSTILE = [
    "# a heading",
    "[a link](https://example.com)",
    "![a picture](https://example.com/x.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "see https://example.com and www.example.com, HTTP://EXAMPLE.COM",
    "mail@example.com and mailto:a@b",
    "**bold** _italic_ ~~struck~~ `code`",
    "a | b | c",
    "a\nb\r\n\r\n## c\u2028d",
    "---\nlicense: mit\n---",
    "a \\ b \\| c",
    "&lt;b&gt; &amp;",
    "$x^2$ and @everyone",
    "footnote[^1]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_shows_as_it_is(text):
    shown = plain(text)
    assert html.unescape(shown) == " ".join(text.split())
    # Every & begins an entity for one character; without the entities nothing is left that means anything.
    rest = re.sub(r"&#[0-9]+;", "", shown)
    assert not re.search(r"[&<>\\`*_{}\[\]|~!$@^=#\n\r]", rest)
    assert not re.search(r"(?i)(https?|mailto):|www\.", rest)


def test_plain_text_stays():
    assert plain("a red circle, and 2 stars (of 3)") == "a red circle, and 2 stars (of 3)"


@pytest.mark.parametrize("text", ["a`b", "``", "a\n\n# b", "a|b"])
def testcode_spans_end_where_they_should(text):
    span = code(text)
    assert span.count("`") == 2 and span[0] == span[-1] == "`" and "\n" not in span
    assert not re.search(r"(?<!\\)\|", span)
