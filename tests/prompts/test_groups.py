"""Draws: shares, wrap-around, purity."""

import collections

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.groups import check_enough, draw, shares, spread
from marble_jax.streams import Stream, stream_generator


def pool(**sizes):
    return {name: [Prompt(f"{name} {i}", name) for i in range(n)] for name, n in sizes.items()}


POOL = pool(general=50, ocr=3, geneval=20)


def test_shares_by_hand():
    names = ("a", "b", "c")
    assert shares(names, 6) == {"a": 2, "b": 2, "c": 2}
    assert shares(names, 8) == {"a": 3, "b": 3, "c": 2}
    # 7 * (1/2, 1/3, 1/6) = 3.5, 2.33, 1.17: the half is rounded up
    assert shares(names, 7, {"a": 3, "b": 2, "c": 1}) == {"a": 4, "b": 2, "c": 1}
    assert shares(names, 5, {"a": 0, "b": 1, "c": 0}) == {"a": 0, "b": 5, "c": 0}


def test_groups_sources_and_repeats():
    d = draw(POOL, seed=42, step=3, num_prompts=6, images_per_prompt=4)
    assert len(d.prompts) == len(d.sources) == 24
    np.testing.assert_array_equal(d.groups, np.repeat(np.arange(6), 4))
    for group in range(6):
        assert len({d.prompts[i].text for i in np.flatnonzero(d.groups == group)}) == 1
    assert collections.Counter(d.sources) == {"general": 8, "geneval": 8, "ocr": 8}
    assert d.sources == tuple(p.source for p in d.prompts)


def test_pure_in_seed_and_step():
    key = dict(prompts=POOL, num_prompts=6, images_per_prompt=2)
    assert draw(seed=1, step=5, **key).prompts == draw(seed=1, step=5, **key).prompts
    assert draw(seed=1, step=5, **key).prompts != draw(seed=1, step=6, **key).prompts
    assert draw(seed=1, step=5, **key).prompts != draw(seed=2, step=5, **key).prompts


def test_wraps_and_keeps_draws_apart():
    d = draw(pool(ocr=3), seed=0, step=0, num_prompts=7, images_per_prompt=2)
    counts = collections.Counter(p.text for p in d.prompts)
    assert sorted(counts.values()) == [
        4,
        4,
        6,
    ]  # 7 draws of 3 prompts: 2, 2 and 3 times, two images each
    assert len(set(d.groups)) == 7


def test_no_repeats_within_a_step_while_a_source_lasts_and_all_get_drawn():
    seen = set()
    for step in range(40):
        texts = [p.text for p in draw(POOL, 0, step, 6, 1).prompts]
        assert len(set(texts)) == 6
        seen.update(texts)
    assert (
        len(seen) > 50
    )  # of 73; two independent draws from each source over 40 steps give 60 on average


def test_parts_drawn_apart_may_give_a_prompt_twice_and_have_equal_shares():
    """3 parts of 6 prompts: two of each source in each part, never twice in a part, but of 3 signs 6 are drawn."""
    d = draw(POOL, seed=4, step=2, num_prompts=18, images_per_prompt=2, num_draws=3)
    np.testing.assert_array_equal(d.groups, np.repeat(np.arange(18), 2))
    for part in range(3):
        drawn = d.prompts[12 * part : 12 * part + 12 : 2]
        assert len({p.text for p in drawn}) == 6
        assert collections.Counter(p.source for p in drawn) == dict.fromkeys(POOL, 2)
    signs = [p.text for p in d.prompts[::2] if p.source == "ocr"]
    assert len(signs) == 6 > len(set(signs))
    again = draw(POOL, seed=4, step=2, num_prompts=18, images_per_prompt=2, num_draws=3)
    assert again.prompts == d.prompts
    whole = draw(POOL, seed=4, step=2, num_prompts=18, images_per_prompt=2)
    assert draw(POOL, 4, 2, 18, 2, num_draws=1).prompts == whole.prompts
    # Of 50 prompts, two parts of many steps meet in one as often as chance has it: 2 * 2 / 50 for each pair.
    met = 0
    for step in range(300):
        texts = [p.text for p in draw(POOL, 0, step, 18, 1, num_draws=3).prompts]
        general = [text for text in texts if text.startswith("general")]
        met += len(general) - len(set(general))
    assert 300 * 3 * 4 / 50 * 0.7 < met < 300 * 3 * 4 / 50 * 1.3
    with pytest.raises(InputError, match="prompts per step: expected a multiple of 4 draws"):
        draw(POOL, 0, 0, 6, 1, num_draws=4)


@pytest.mark.parametrize("num_prompts", [1, 2, 4, 5, 7])
def test_sources_take_turns_at_what_does_not_divide(num_prompts):
    """Of three sources every three draws give each `num_prompts`, whatever that is, and no draw differs by two."""
    counts = []
    for step in range(60):
        drawn = draw(POOL, 5, step, num_prompts, 2)
        assert drawn.prompts == draw(POOL, 5, step, num_prompts, 2).prompts
        counts.append(collections.Counter(prompt.source for prompt in drawn.prompts[::2]))
        numbers = [counts[-1][name] for name in POOL]
        assert sum(numbers) == num_prompts and max(numbers) - min(numbers) == 1
    for first in range(0, 60, 3):
        assert sum(counts[first : first + 3], collections.Counter()) == dict.fromkeys(
            POOL, num_prompts
        )
    # What looks at every third step alone, such as a solve, does not see one source time and again.
    for first in range(3):
        assert len({tuple(counts[step][name] for name in POOL) for step in range(first, 60, 3)}) > 1


def test_parts_take_turns_too():
    """3 parts of 2 prompts: every step has 2 of each source, where one of them had none before."""
    for step in range(5):
        drawn = draw(POOL, 5, step, 6, 1, num_draws=3)
        assert collections.Counter(drawn.sources) == dict.fromkeys(POOL, 2)
        for part in range(3):
            assert len(set(drawn.sources[2 * part : 2 * part + 2])) == 2


def test_equal_shares_are_drawn_as_the_streams_say():
    """Nothing of a draw that the sources divide depends on turns: a permutation a source, and one of the whole."""
    for step in range(4):
        expected = []
        for number, name in enumerate(sorted(POOL)):
            order = stream_generator(3, Stream.PROMPTS, step, number).permutation(len(POOL[name]))
            expected += [POOL[name][index] for index in order[:2]]
        order = stream_generator(3, Stream.PROMPT_ORDER, step).permutation(6)
        assert list(draw(POOL, 3, step, 6, 1).prompts) == [expected[index] for index in order]


def test_prompts_of_one_draw_alone_are_enough_for_all_sources():
    check_enough("key", 3, ("a", "b", "c"))
    with pytest.raises(
        InputError,
        match=r"^key: expected at least 3, one for each source \(a, b, c\); received 2$",
    ):
        check_enough("key", 2, ("a", "b", "c"))


def test_spread_by_hand():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 5) == [0, 1, 2]


def test_groups_of_equal_prompts_merge_draws():
    texts = ("A cat", "two  dogs", "a cat ", "Two dogs", "fog")
    prompts = {"x": [Prompt(text, "x") for text in texts]}
    d = draw(prompts, 0, 0, 5, 2)
    labels = d.groups_of_equal_prompts()
    by_label = collections.defaultdict(set)
    for prompt, label in zip(d.prompts, labels):
        by_label[int(label)].add(prompt.text)
    assert sorted(map(sorted, by_label.values())) == [
        ["A cat", "a cat "],
        ["Two dogs", "two  dogs"],
        ["fog"],
    ]
    assert len(labels) == 10 and labels.dtype == np.int32


def test_weights_and_unweighted_sources():
    d = draw(
        POOL | {"empty": []}, 0, 0, 4, 1, weights={"general": 3, "ocr": 1, "geneval": 0, "empty": 0}
    )
    assert collections.Counter(d.sources) == {"general": 3, "ocr": 1}


def test_rejects_bad_input():
    with pytest.raises(InputError, match="images_per_prompt: expected at least 1; received 0"):
        draw(POOL, 0, 0, 4, 0)
    with pytest.raises(InputError, match="prompts per step: expected at least 1; received 0"):
        draw(POOL, 0, 0, 0, 1)
    with pytest.raises(InputError, match="source 'ocr': expected at least one prompt"):
        draw({"ocr": []}, 0, 0, 1, 1)
    with pytest.raises(InputError, match="prompt sources: expected at least one"):
        draw({}, 0, 0, 1, 1)
    with pytest.raises(InputError, match="source weights: expected one of .*did you mean 'ocr'"):
        shares(("ocr",), 1, {"ocrr": 1})
    with pytest.raises(InputError, match="expected a weight for 'b'"):
        shares(("a", "b"), 1, {"a": 1})
    with pytest.raises(InputError, match="expected a number >= 0 for 'a'"):
        shares(("a",), 1, {"a": -1})
    with pytest.raises(InputError, match="received only zeros"):
        shares(("a",), 1, {"a": 0})
