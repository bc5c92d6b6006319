"""Judges with several numbers, with probabilities of tokens and questions of metadata, against stand-in servers."""

from __future__ import annotations

import json
import math
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from endpoint import Endpoint

from marble_jax.errors import InputError
from marble_jax.prompts.files import read_file
from marble_jax.rewards.base import RewardError, score
from marble_jax.rewards.http.judge_numbers import SharedAnswers, expand
from marble_jax.rewards.http.judge_probability import combined, first_token, probability, spellings
from marble_jax.rewards.registry import entries_of, load_rewards

IMAGES = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
PROMPTS = ("two cats", "a dog")
NAMES = ("judge_alignment", "judge_coherence", "judge_style")


def judge(answer):
    """A chat endpoint: `answer(text)` is a text, or the likeliest first tokens with their probabilities."""

    def reply(number, handler, body):
        request = json.loads(body)
        text = request["messages"][0]["content"][-1]["text"]
        said = answer(text)
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        if isinstance(said, dict):
            assert request["logprobs"] is True and request["top_logprobs"] == 20
            assert request["max_tokens"] == 1
            top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in said.items()]
            first = max(top, key=lambda entry: entry["logprob"])
            choice |= {
                "message": {"role": "assistant", "content": first["token"]},
                "finish_reason": "length",
                "logprobs": {"content": [first | {"top_logprobs": top}], "refusal": None},
            }
        else:
            assert "logprobs" not in request
        return 200, {}, json.dumps({"choices": [{"index": 0} | choice]}).encode()

    return Endpoint(reply)


def load(folder, names, server, **entry):
    entry = {"kind": "openai", "urls": [server.url + "/v1"], "model": "m", "retries": 0} | entry
    (folder / "rewards.json").write_text(json.dumps({"judge": entry}))
    return load_rewards(folder, names)


def run(reward, metadata=({}, {})):
    return score(reward, IMAGES, PROMPTS, metadata)


THREE = "The cats are there.\nAlignment Score (1-5): 5\n**Coherence Score (1-5):** 2.0\nStyle Score: 4/5"


def test_one_answer_gives_three_rewards_and_is_asked_for_once(tmp_path):
    with judge(lambda text: THREE if "two cats" in text else "Alignment Score: 1") as server:
        rewards = load(tmp_path, NAMES, server, preset="unifiedreward2")
        assert list(entries_of(tmp_path)) == list(NAMES)
        first, *others = map(run, rewards)
        # One request an image, and one for the answer of which coherence made nothing: style has it asked for anew.
        assert len(server.bodies) == 2 + 1
    # (number - 1) / 4, as UnifiedReward 2.0 is read elsewhere; a number that is not there is missing.
    np.testing.assert_allclose(first.values, [1.0, 0.0])
    assert first.valid.all()
    for got, value in zip(others, (0.25, 0.75)):
        np.testing.assert_allclose(got.values, [value, 0])
        np.testing.assert_array_equal(got.failed, [False, True])


def test_rewards_that_ask_at_the_same_time_share_the_answer(tmp_path):
    gate = threading.Barrier(2, timeout=20)

    def answer(text):
        # Both images are asked about at once; the other rewards wait for these answers.
        gate.wait()
        return THREE

    with judge(answer) as server:
        rewards = load(tmp_path, NAMES, server, preset="unifiedreward2")
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(run, rewards))
        assert len(server.bodies) == 2
    np.testing.assert_allclose([result.values for result in got], [[1, 1], [0.25] * 2, [0.75] * 2])


def test_one_number_or_their_mean_is_a_reward_of_the_entrys_name(tmp_path):
    with judge(lambda text: THREE) as server:
        for number, value in (("style", 0.75), ("mean", (1 + 0.25 + 0.75) / 3)):
            (reward,) = load(tmp_path, ["judge"], server, preset="unifiedreward2", number=number)
            np.testing.assert_allclose(run(reward).values, value, rtol=1e-6)


def test_numbers_of_ones_own_by_pattern_and_in_json(tmp_path):
    numbers = {"hands": r"hands=(\d+)", "light": ""}
    with judge(lambda text: 'hands=8 {"light": 5}') as server:
        rewards = load(tmp_path, ["judge_hands", "judge_light"], server, numbers=numbers)
        values = [run(reward).values[0] for reward in rewards]
    np.testing.assert_allclose(values, [0.8, 0.5])


def test_a_number_is_not_called_as_the_mean_of_all(tmp_path):
    with judge(lambda text: "mean: 8 light: 2") as server:
        numbers = {"mean": r"mean: (\d)", "light": r"light: (\d)"}
        with pytest.raises(
            InputError, match="numbers: expected another name than 'mean', .* mean, light"
        ):
            load(tmp_path, ["judge_mean"], server, numbers=numbers)


def test_entries_with_other_tokens_are_called_with_their_own(tmp_path, monkeypatch):
    """Of one endpoint and model: answers are shared among those that are called alike."""
    for name in ("ONE", "TWO"):
        monkeypatch.setenv(f"MARBLE_TEST_{name}", name)
    with judge(lambda text: "hands: 8 light: 5") as server:
        entry = {"kind": "openai", "urls": [server.url + "/v1"], "model": "m"}
        entry["numbers"] = {"hands": r"hands: (\d)", "light": r"light: (\d)"}
        entries = {
            "first": entry | {"token_env": "MARBLE_TEST_ONE"},
            "second": entry | {"token_env": "MARBLE_TEST_TWO"},
        }
        (tmp_path / "rewards.json").write_text(json.dumps(entries))
        names = [f"{name}_{number}" for name in entries for number in ("hands", "light")]
        for reward in load_rewards(tmp_path, names):
            assert run(reward).valid.all()
        tokens = [headers["Authorization"] for _, headers in server.headers]
    assert sorted(tokens) == ["Bearer ONE"] * 2 + ["Bearer TWO"] * 2


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        ({"Yes": 0.6, " No": 0.2, "Maybe": 0.1}, 0.75),
        ({"\u2581yes": 0.3, "YES.": 0.3, "no": 0.2}, 0.75),
        ({"Yes": 0.9}, 1.0),
        ({"No": 0.9, "Well": 0.1}, 0.0),
    ],
)
def test_probability_of_yes_against_no(tmp_path, tokens, value):
    def answer(text):
        assert text.startswith('Does this image show "')
        return tokens

    with judge(answer) as server:
        (reward,) = load(tmp_path, ["judge"], server, preset="yes_no")
        np.testing.assert_allclose(run(reward).values, [value, value], rtol=1e-6)


def test_a_judge_that_says_neither_has_no_probability(tmp_path):
    with judge(lambda text: {"<think>": 0.99, "The": 0.01}) as server:
        (reward,) = load(tmp_path, ["judge"], server, preset="yes_no")
        with pytest.raises(RewardError, match="expected one of yes, no among .*'<think>'"):
            run(reward)
    no_tokens = {"choices": [{"message": {"content": "Yes"}, "finish_reason": "length"}]}
    with Endpoint(lambda *_: (200, {}, json.dumps(no_tokens).encode())) as server:
        (reward,) = load(tmp_path, ["judge"], server, preset="yes_no")
        with pytest.raises(RewardError, match="does the endpoint give logprobs"):
            run(reward)


def test_questions_of_metadata_as_geneval_2_has_them(tmp_path):
    line = {
        "prompt": "two red cats",
        "atom_count": 2,
        "vqa_list": [["How many cats?", "two"], ["What colour are the cats?", "red"]],
        "skills": ["counting", "attribute"],
    }
    (tmp_path / "geneval2.jsonl").write_text(json.dumps(line) + "\n")
    (prompt,) = read_file(tmp_path / "geneval2.jsonl")
    asked = {
        "How many cats? Answer in one word.": {"Two": 0.3, "2": 0.2, "three": 0.4},
        "What colour are the cats? Answer in one word.": {"Red": 0.08, "blue": 0.9},
    }
    with judge(asked.__getitem__) as server:
        for preset, value in (("geneval2", 0.29), ("geneval2_geometric", math.sqrt(0.5 * 0.08))):
            (reward,) = load(tmp_path, ["judge"], server, preset=preset)
            got = score(reward, IMAGES[:1], [prompt.text], [prompt.metadata])
            np.testing.assert_allclose(got.values, [value], rtol=1e-6)
        # A prompt without questions is none of its business.
        got = run(reward)
        assert not got.valid.any() and not got.failed.any()


def test_malformed_questions_are_failures(tmp_path):
    with judge(lambda text: {"two": 1.0}) as server:
        (reward,) = load(tmp_path, ["judge"], server, preset="geneval2")
        good = {"vqa_list": [["How many?", "2"]]}
        got = run(reward, [good, {"vqa_list": [["How many?"]]}])
        assert got.values[0] == 1
        np.testing.assert_array_equal(got.failed, [False, True])
        with pytest.raises(RewardError, match="expected 1 to 64 .*; received 65"):
            score(reward, IMAGES[:1], PROMPTS[:1], [{"vqa_list": [["q", "a"]] * 65}])


def test_counts_as_words_and_digits():
    assert spellings("Two") == ("two", "2") and spellings("11") == ("11", "eleven")
    assert spellings("21") == ("21",) and spellings("Red.") == ("red",)


def test_probabilities_by_hand():
    assert probability({"a": 0.5, "b": 0.25}, ["a", "b"]) == 0.75
    assert probability({"a": 0.5}, ["c"]) == 0
    assert combined([0.5, 0.25], "mean") == 0.375
    assert combined([0.5, 0.0], "geometric") == 0
    assert combined([0.5, 0.125], "geometric") == pytest.approx(0.25)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"logprobs": None},
        {"logprobs": {"content": []}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "a"}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": 0.5}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": "x"}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": None, "logprob": -1}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": math.nan}]}]}},
    ],
)
def test_logprobs_that_are_none_are_told(choice):
    with pytest.raises(RewardError, match="answer: expected .*received"):
        first_token(choice)


def test_an_answer_of_no_use_is_asked_for_again():
    answers = iter([ValueError("down"), b"bad", b"good"])

    def ask(request):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    shared = SharedAnswers(None, most=1)
    with pytest.raises(ValueError, match="down"):
        shared.call(b"q", ask)
    assert shared.call(b"q", ask) == shared.call(b"q", ask) == b"bad"
    shared.forget(b"q")
    assert shared.call(b"q", ask) == b"good"
    shared.call(b"other", lambda request: b"x")
    assert shared.call(b"q", lambda request: b"anew") == b"anew"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"preset": "unifiedreward2", "number": "beauty"},
            "number: expected one of alignment, coherence, style, mean",
        ),
        (
            {"number": "style"},
            "number: expected with numbers, or a preset that has some; received 'style'",
        ),
        (
            {"answer": "probability"},
            "expected either expected answers or questions .*; received neither",
        ),
        ({"preset": "yes_no", "questions": "vqa_list", "prompt": "{question}"}, "received both"),
        (
            {"preset": "yes_no", "against": ["YES"]},
            "expected other answers in against .*; received 'yes'",
        ),
        (
            {"preset": "geneval2", "prompt": "{prompt}?"},
            r"expected \{question\} in the judge's text",
        ),
        (
            {"questions": "vqa_list", "prompt": "{question}"},
            "questions: expected with answer=probability",
        ),
        ({"answer": "token"}, "answer: expected one of number, probability"),
        ({"preset": "geneval2", "combine": "max"}, "combine: expected one of mean, geometric"),
        ({"zero": 10}, "expected zero < high; received 10 and 10"),
        ({"numbers": {"a": "("}, "number": "a"}, "expected a regular expression as pattern"),
        ({"numbers": ["a"]}, "numbers: expected"),
    ],
)
def test_entries_that_make_no_sense(tmp_path, entry, message):
    entry = {"kind": "openai", "urls": ["http://127.0.0.1:9/v1"], "model": "m"} | entry
    (tmp_path / "rewards.json").write_text(json.dumps({"judge": entry}))
    with pytest.raises(InputError, match=message):
        load_rewards(tmp_path, ["judge"])


def test_names_that_two_entries_come_to():
    judged = {"kind": "openai", "numbers": {"style": ""}}
    with pytest.raises(InputError, match="expected every name once; received 'judge_style'"):
        expand({"judge": judged, "judge_style": {"kind": "ocr"}}, "rewards.json")


@pytest.fixture
def hpsv3(monkeypatch):
    """A package of that name whose model prefers what is bright; notes what it was given."""
    seen = []

    class Inferencer:
        def __init__(self, config_path=None, checkpoint_path=None, device="cuda"):
            self.model = types.SimpleNamespace(requires_grad_=seen.append)
            seen.append((checkpoint_path, device))

        def reward(self, image_paths, prompts):
            seen.append((len(image_paths), prompts))
            return np.array([[np.asarray(image).mean() / 10 - 9, 1.5] for image in image_paths])

    module = types.ModuleType("hpsv3")
    module.HPSv3RewardInferencer = Inferencer
    monkeypatch.setitem(sys.modules, "hpsv3", module)
    return seen


def test_hpsv3_is_the_mean_of_its_score(tmp_path, hpsv3):
    entry = {"kind": "hpsv3", "device": "cpu", "batch_size": 1}
    (tmp_path / "rewards.json").write_text(json.dumps({"hpsv3": entry}))
    (reward,) = load_rewards(tmp_path, ["hpsv3"])
    got = run(reward)
    pixels = np.round(IMAGES * 255)
    np.testing.assert_allclose(got.values, pixels.mean((1, 2, 3)) / 10 - 9, rtol=1e-5)
    assert hpsv3 == [(None, "cpu"), False, (1, ["two cats"]), (1, ["a dog"])]
    reward._inferencer.reward = lambda image_paths, prompts: np.zeros((1, 3))
    with pytest.raises(RewardError, match=r"expected a mean and a spread of 1 images; .*\(1, 3\)"):
        run(reward)


def test_hpsv3_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv3", None)
    (tmp_path / "rewards.json").write_text(json.dumps({"hpsv3": {"kind": "hpsv3"}}))
    with pytest.raises(InputError, match="expected the package hpsv3; received none"):
        load_rewards(tmp_path, ["hpsv3"])
