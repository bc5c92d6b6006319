"""What is said of prompts that a text encoder cuts, and of rewards that apply to few prompts or to none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from marble_jax.errors import InputError
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.programs.prompt_remarks import Reach, cut_lines, reach_line, reach_of
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.training.reward_schedule import RewardSchedule, Stage


def words(texts, truncation, max_length):
    """A tokenizer with a token a word and one at the end."""
    ids = [[*range(len(text.split())), -1] for text in texts]
    return SimpleNamespace(input_ids=[row[:max_length] for row in ids])


def limit(tokens, clean=str):
    return PromptLimit("T5", tokens, lambda: [words], clean)


def test_prompts_of_more_tokens_than_are_read_are_cut():
    """Four words and the end are five tokens."""
    prompts = ["one two three four", "one two three four five", "a b c d e f", "one two three four"]
    assert limit(5).cut(prompts) == prompts[1:3]
    assert limit(7).cut(prompts) == []
    assert limit(4).cut(prompts) == prompts
    # Cut where one tokenizer of several makes more of them.
    letters = PromptLimit("CLIP", 9, lambda: [words, lambda t, **_: words([" ".join(t[0])], **_)])
    assert letters.cut(["abcdefghi"]) == ["abcdefghi"] and letters.cut(["abcdefgh"]) == []


def test_a_prompt_is_counted_as_the_encoder_reads_it():
    assert limit(5, clean=lambda text: text.replace("-", " ")).cut(["a-b-c-d-e"]) == ["a-b-c-d-e"]


def test_no_tokenizer_is_opened_for_prompts_that_are_short_in_any():
    def refuse():
        raise AssertionError("opened")

    short = PromptLimit("CLIP", 77, refuse)
    assert short.cut(["a" * 73, "", "b c"]) == []
    # A letter beyond ASCII may be several tokens.
    for long in ("a" * 74, "ö"):
        with pytest.raises(AssertionError, match="opened"):
            short.cut([long])


def test_a_line_for_each_encoder_that_cuts():
    limits = [limit(4), limit(5), limit(100)]

    def cut(texts):
        found = [(each, each.cut(texts)) for each in limits]
        return [(each, longer) for each, longer in found if longer]

    texts = ["one two three four", "a b c d e", "a b c d e", "short one"]
    assert cut_lines(SimpleNamespace(cut=cut), texts) == [
        "2 of 3 prompts are cut at 4 tokens by T5, first: 'one two three four'",
        "1 of 3 prompts are cut at 5 tokens by T5, first: 'a b c d e'",
    ]


class Quoted(Reward):
    """Applies to prompts with a quotation."""

    def applies(self, prompt, metadata):
        return '"' in prompt


PROMPTS = {
    "general": [Prompt("a cat", "general"), Prompt("a dog", "general")],
    "signs": [Prompt('"A"', "signs"), Prompt('"B"', "signs"), Prompt("a sign", "signs")],
}
OCR, ANY = Quoted(name="ocr", kind="host"), Reward(name="any", kind="device")
SIGNS_ONLY = Reward(name="only", kind="device", sources=("signs",))


def test_prompts_that_a_reward_applies_to_by_hand():
    found = reach_of([OCR, ANY, SIGNS_ONLY], PROMPTS, RewardSchedule())
    assert found == {"ocr": Reach(2, 5), "any": Reach(5, 5), "only": Reach(3, 5)}
    assert reach_line(found) == "ocr applies to 2 of 5, only applies to 3 of 5"
    assert reach_line({"any": Reach(5, 5)}) == ""


def test_a_reward_that_applies_to_no_training_prompt_is_refused():
    general = {"general": PROMPTS["general"]}
    for reward in (OCR, SIGNS_ONLY):
        with pytest.raises(
            InputError,
            match=f"^rewards.train: {reward.name}: expected training prompts that it applies to; received "
            "none among 2 of general ",
        ):
            reach_of([ANY, reward], general, RewardSchedule())


def test_a_reward_of_a_stage_is_counted_on_what_the_stage_draws():
    stages = (Stage(("any",), (), 0), Stage(("ocr", "any"), ("signs",), 5))
    found = reach_of([OCR, ANY], PROMPTS, RewardSchedule(stages))
    assert found == {"ocr": Reach(2, 3), "any": Reach(5, 5)}
    stages = (Stage(("any",), (), 0), Stage(("ocr",), ("general",), 5))
    with pytest.raises(InputError, match="ocr: .* none among 2 of general"):
        reach_of([OCR, ANY], PROMPTS, RewardSchedule(stages))
