"""Rewards over HTTP against this project's server, a judge's chat endpoint, and the older servers' pickles."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle

import numpy as np
import pytest
from endpoint import Endpoint
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.base import Reward, RewardError
from marble_jax.rewards.frames import parse_frames
from marble_jax.rewards.function import FunctionReward
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.rewards.http.pickles import load_plain
from marble_jax.rewards.http.protocol import decode_groups
from marble_jax.rewards.http.server import RewardServer
from marble_jax.rewards.registry import load_rewards

PIXELS = np.arange(5, dtype=np.uint8)[:, None, None, None] * 50 + np.arange(
    48, dtype=np.uint8
).reshape(1, 4, 4, 3)
IMAGES, PROMPTS = PIXELS.astype(np.float32) / 255, ["a", "skip", "bad", "d", "e"]
METADATA = [{"n": i, "include": []} for i in range(5)]


def load(tmp_path, **entry):
    (tmp_path / "rewards.json").write_text(json.dumps({"mine": entry}))
    return load_rewards(tmp_path, ["mine"])[0]


def run(reward, count=5):
    return base.score(reward, IMAGES[:count], PROMPTS[:count], METADATA[:count])


class Mean(Reward):
    """Mean brightness plus the metadata's number."""

    def __init__(self, name="mine"):
        super().__init__(name=name, kind="host")
        self.sizes, self.failing = [], ()

    def applies(self, prompt, metadata):
        return prompt != "skip"

    def score(self, params, images, prompts, metadata):
        self.sizes.append(len(images))
        if set(prompts) & set(self.failing):
            raise OSError("gone")
        return images.mean((1, 2, 3)) + [m["n"] for m in metadata], np.array(
            [p != "bad" for p in prompts]
        )


@pytest.mark.parametrize("image_format", ["png", "rgb8"])
def test_client_and_server_agree_with_the_reward_itself(tmp_path, monkeypatch, image_format):
    monkeypatch.setenv("MARBLE_TEST_TOKEN", "t")
    mean = Mean("there")
    with (
        RewardServer([mean], options=ServerOptions(token="t", workers=4)) as one,
        RewardServer([mean], options=ServerOptions(token="t", workers=4)) as two,
    ):
        remote = load(
            tmp_path,
            kind="remote",
            urls=[one.url, two.url],
            reward="there",
            batch_size=2,
            token_env="MARBLE_TEST_TOKEN",
            format=image_format,
        )
        got, want = run(remote), run(mean)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)
    assert sorted(mean.sizes[:3]) == [1, 2, 2]
    np.testing.assert_array_equal(got.failed, [False, False, True, False, False])


def test_a_batch_that_fails_is_missing_alone(tmp_path, caplog):
    mean = Mean()
    mean.failing = ("d",)
    with RewardServer([mean]) as server:
        got = run(
            load(tmp_path, kind="remote", urls=[server.url], batch_size=2, retries=1, pause=0.01)
        )
        np.testing.assert_array_equal(got.failed, [False, False, True, True, False])
        assert (
            "reward mine failed in 1 of 3 calls: RewardError" in caplog.text
            and "OSError: gone" in caplog.text
        )
        mean.failing = PROMPTS
        with pytest.raises(RewardError, match=r"500 reward mine: OSError: gone \(attempt 2 of 2\)"):
            run(
                load(
                    tmp_path, kind="remote", urls=[server.url], batch_size=2, retries=1, pause=0.01
                )
            )


@pytest.mark.parametrize(
    "answer, message",
    [
        (b'{"scores": [1, 2]}', "answer: expected 3 scores; received 2"),
        (b"<html>", "answer: expected valid JSON; received an error at Expecting value"),
        (b"[" * 100_000, "answer: expected JSON nested at most 64 deep"),
        (b"[1]", "answer: expected a JSON object; received a list"),
        (b'{"scores": [1, 2, "x"]}', "answer: expected numbers or null as scores; received 'x'"),
    ],
)
def test_nonsense_is_an_error(tmp_path, answer, message):
    with (
        Endpoint(lambda *_: (200, {}, answer)) as server,
        pytest.raises(RewardError, match=message),
    ):
        run(load(tmp_path, kind="remote", urls=[server.url]), 3)


CLIPS = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4, 3), np.uint8)


def run_clips(reward):
    return base.score(reward, CLIPS.astype(np.float32) / 255, PROMPTS, METADATA)


class ClipMean(Mean):
    """Mean of a clip's last frame plus the metadata's number."""

    def __init__(self):
        super().__init__("mine")
        self.takes = "clips"
        self.min_frames = 2

    def score(self, params, images, prompts, metadata):
        assert images.shape[1:] == (3, 4, 4, 3)
        return super().score(params, images[:, -1], prompts, metadata)


@pytest.mark.parametrize("image_format", ["png", "rgb8"])
def test_whole_clips_through_the_server(tmp_path, image_format):
    mean = ClipMean()
    with RewardServer([mean]) as server:
        remote = load(
            tmp_path,
            kind="remote",
            urls=[server.url],
            takes="clips",
            batch_size=7,
            format=image_format,
        )
        got, want = run_clips(remote), run_clips(mean)
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b)
        # Seven images are two clips of three frames.
        assert sorted(mean.sizes[:3]) == [1, 2, 2]
        with pytest.raises(
            RewardError, match="400 reward mine: expected clips of at least 2 frames; received 1"
        ):
            run(remote)


def test_functions_behind_a_server_are_told_the_frame_rate(tmp_path):
    def seconds(clip, prompt, metadata, fps=-1):
        return len(clip) / fps

    served = FunctionReward("mine", seconds)
    with RewardServer([served]) as server:
        entry = {"kind": "remote", "urls": [server.url], "takes": "clips"}
        remote = load(tmp_path, **entry)
        # Nobody says: the function's own default.
        np.testing.assert_array_equal(run_clips(remote).values, [-3] * 5)
        remote.frames_per_second = 12
        np.testing.assert_array_equal(run_clips(remote).values, [0.25] * 5)
        # Frames 0 and 2, as one choice or the other has it.
        served.frames = parse_frames("", "every:2")
        np.testing.assert_array_equal(run_clips(remote).values, np.float32([2 / 6] * 5))
    assert served.frames_per_second is None


def test_frames_of_clips_through_a_server_of_images(tmp_path):
    mean = Mean()
    with RewardServer([mean]) as server:
        entry = {"kind": "remote", "urls": [server.url]}
        remote = load(tmp_path, **entry, frames="count:2", frame_reduction="min")
        mean.frames = remote.frames
        mean.reduction = "min"
        got, want = run_clips(remote), run_clips(mean)
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b)
        # The server makes frames of clips as well, if it was told which.
        whole = run_clips(load(tmp_path, **entry, takes="clips"))
        np.testing.assert_array_equal(whole.values, want.values)
        mean.frames = None
        with pytest.raises(
            RewardError, match="400 reward mine: expected a choice of frames, .* 3 frames"
        ):
            run_clips(load(tmp_path, **entry, takes="clips"))


def test_a_clip_for_a_server_of_version_1(tmp_path):
    """What the server of an earlier release answers; no use in asking again."""

    def reply(number, handler, body):
        return 400, {}, b'{"error": "header: expected version 1; received 2"}'

    with Endpoint(reply) as server:
        remote = load(tmp_path, kind="remote", urls=[server.url], takes="clips", batch_size=99)
        message = "reward mine: expected a server of protocol version 2, which takes clips; received one of version 1"
        with pytest.raises(RewardError, match=message) as caught:
            run_clips(remote)
        assert len(server.bodies) == 1 and "\n" not in str(caught.value)


def test_a_judge_sees_the_frames_of_a_clip_together(tmp_path):
    asked = []

    def reply(number, handler, body):
        (message,) = json.loads(body)["messages"]
        *images, text = message["content"]
        frames = []
        for image in images:
            data = image["image_url"]["url"].partition(",")[2]
            frames.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        number = [
            n for n, clip in enumerate(CLIPS) if np.array_equal(clip[[0, 2]], np.stack(frames))
        ][0]
        asked.append(text["text"])
        return 200, {}, chat(f"Score: {number + 1}" if number != 2 else "no idea")

    with Endpoint(reply) as server:
        entry = {"kind": "openai", "urls": [server.url], "model": "j", "takes": "clips"}
        got = run_clips(load(tmp_path, **entry, frames="count:2"))
    np.testing.assert_allclose(got.values, [0.1, 0.2, 0, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(got.failed, [False, False, True, False, False])
    assert all(text.startswith("You see frames of one video clip, in order.") for text in asked)


def chat(text):
    """An OpenAI-compatible answer, as vLLM gives it."""
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "judge",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "tool_calls": []},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 5, "total_tokens": 9},
        }
    ).encode()


def judge_by(answer):
    """A chat endpoint that answers `answer(prompt, image)`; checks the request's form."""

    def reply(number, handler, body):
        assert (
            handler.path == "/v1/chat/completions"
            and handler.headers["Content-Type"] == "application/json"
        )
        request = json.loads(body)
        (message,) = request["messages"]
        image, text = message["content"]
        assert message["role"] == "user" and (image["type"], text["type"]) == (
            "image_url",
            "text",
        )
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        return 200, {"Content-Type": "application/json"}, chat(answer(request, text["text"], image))

    return Endpoint(reply)


def test_a_judge_is_asked_about_each_image_and_its_number_read(tmp_path):
    def answer(request, text, image):
        assert (
            request["model"] == "judge-7b"
            and request["temperature"] == 0
            and request["max_tokens"] == 512
        )
        number = [i for i in range(5) if np.array_equal(image, PIXELS[i])][0]
        assert f"Text: {PROMPTS[number]}\n" in text
        return [
            "It is a 3.\nScore: 7",
            "**Score:** 2.5",
            "no idea",
            "Score: 11",
            "First score: 9. Final score: 10/10",
        ][number]

    with judge_by(answer) as server:
        got = run(load(tmp_path, kind="openai", urls=[server.url + "/v1"], model="judge-7b"))
    np.testing.assert_allclose(got.values, [0.7, 0.25, 0, 0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(got.failed, [False, False, True, True, False])


def test_the_unifiedreward_preset(tmp_path):
    """Images of 512 x 512, the tag "Final Score:", a fifth of the number (reference facts of the original scorer)."""

    def answer(request, text, image):
        assert image.shape == (512, 512, 3) and "Caption: a" in text and "Final Score:" in text
        want = np.asarray(Image.fromarray(PIXELS[0]).resize((512, 512), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(image, want)
        return "Score: 1 for the shape.\nFinal Score: 4.5"

    with judge_by(answer) as server:
        got = run(
            load(
                tmp_path,
                kind="openai",
                urls=[server.url + "/v1"],
                model="m",
                preset="unifiedreward",
            ),
            1,
        )
    np.testing.assert_allclose(got.values, [0.9], rtol=1e-6)


def test_a_judge_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "ask.txt").write_text('Is it {prompt}? Answer {"reason": ..., "rating": 0 to 2}')
    (tmp_path / "key").write_text("sk-1")
    (tmp_path / "key").chmod(0o600)

    def answer(request, text, image):
        assert (
            text == 'Is it a? Answer {"reason": ..., "rating": 0 to 2}'
            and request["max_tokens"] == 20
        )
        return '```json\n{"reason": "it {is}", "x": 1}\n{"rating": 1, "reason": "yes"}\n```'

    with judge_by(answer) as server:
        got = run(
            load(
                tmp_path,
                kind="openai",
                urls=[server.url + "/v1"],
                model="m",
                prompt_file="ask.txt",
                field="rating",
                low=0,
                high=2,
                max_tokens=20,
                token_file=str(tmp_path / "key"),
                applies="geneval",
            ),
            1,
        )
        assert server.headers[0][1]["Authorization"] == "Bearer sk-1"
    np.testing.assert_allclose(got.values, [0.5])


def test_judges_that_say_nothing_of_use(tmp_path):
    for data, message in (
        (chat("fine image"), "answer: expected a number from 1 to 10; received 'fine image'"),
        (b'{"choices": []}', r"answer: expected choices\[0\].message.content; received"),
        (chat(None), r"answer: expected choices\[0\].message.content; received"),
        (b"<", "received b'<'"),
    ):
        with (
            Endpoint(lambda *_, data=data: (200, {}, data)) as server,
            pytest.raises(RewardError, match=message),
        ):
            run(load(tmp_path, kind="openai", urls=[server.url], model="m"), 1)
    body = b'{"object": "error", "message": "x", "error": {"message": "The model `m` does not exist.", "code": 404}}'
    with Endpoint(lambda *_: (404, {}, body)) as server:
        with pytest.raises(RewardError, match="404 The model `m` does not exist"):
            run(load(tmp_path, kind="openai", urls=[server.url], model="m"), 1)


class Evil:
    """A pickle that runs a command when loaded."""

    def __reduce__(self):
        return os.system, ("touch /tmp/marble_test_evil",)


def old_server(answer, protocol=2):
    """Answers as the older servers do: pickles in, pickles out."""

    def reply(number, handler, body):
        request = pickle.loads(body)
        assert (
            set(request) == {"images", "prompts", "meta_datas", "only_strict"}
            and request["only_strict"] is True
        )
        images = [np.asarray(Image.open(io.BytesIO(p))) for p in request["images"]]
        return 200, {}, pickle.dumps(answer(request, images), protocol)

    return Endpoint(reply)


OLD = {"kind": "remote", "protocol": "flow_grpo", "allow_pickle": True, "batch_size": 2}


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        lambda v: [np.float64(x) for x in v],
        tuple,
        lambda v: np.array(v, np.float32),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_older_servers(tmp_path, caplog, convert, protocol):
    def answer(request, images):
        assert all(p.shape == (4, 4, 3) for p in images) and all(
            isinstance(m, dict) for m in request["meta_datas"]
        )
        return {
            "scores": convert([m["n"] + 0.5 for m in request["meta_datas"]]),
            "rewards": [None],
            "groups": {},
        }

    with old_server(answer, protocol) as server:
        got = run(load(tmp_path, urls=[server.url], **OLD))
    np.testing.assert_allclose(got.values, [0.5, 1.5, 2.5, 3.5, 4.5])
    assert "reward mine: answers are pickles" in caplog.text


def test_older_servers_outputs_field(tmp_path):
    with old_server(lambda request, images: {"outputs": [0.8] * len(images)}) as server:
        assert run(load(tmp_path, urls=[server.url], field="outputs", **OLD)).valid.all()


@pytest.mark.parametrize(
    "value, message",
    [
        (Evil(), "pickle: expected containers, numbers and arrays; received (posix|nt).system"),
        ({"scores": [1.0]}, "answer: expected 2 numbers in 'scores'; received \\(1,\\)"),
        ({"scores": ["1", "2"]}, "answer: expected 2 numbers in 'scores'; received none"),
        ({"score": [1, 2]}, "answer: expected 2 numbers in 'scores'; received none"),
        ([1, 2], "answer: expected 2 numbers in 'scores'; received none"),
        ({"scores": np.array(["a", "b"])}, "received none"),
        ({"scores": np.array([1, 2], object)}, "received none"),
    ],
)
def test_older_servers_that_are_not_to_be_trusted(tmp_path, value, message):
    with (
        old_server(lambda request, images: value) as server,
        pytest.raises(RewardError, match=message),
    ):
        run(load(tmp_path, urls=[server.url], **OLD), 2)
    assert not os.path.exists("/tmp/marble_test_evil")


def test_plain_pickles():
    value = {
        "a": [1, 2.5, None, True, "x", b"y", (1, {2})],
        "b": np.arange(3),
        "c": np.float32(2),
        "d": {1: {}},
    }
    for protocol in (4, 5):
        got = load_plain(pickle.dumps(value, protocol))
        np.testing.assert_array_equal(got.pop("b"), value["b"])
        assert got == {k: v for k, v in value.items() if k != "b"}
    for protocol in range(6):
        np.testing.assert_array_equal(
            load_plain(pickle.dumps([b"\xff", np.arange(3)], protocol))[1], [0, 1, 2]
        )
    with pytest.raises(RewardError, match="received a codec"):
        load_plain(b"c_codecs\nencode\n(Vx\nVrot13\ntR.")
    for data in (b"", b"\x80\x04", b"not a pickle", pickle.dumps([1])[:-2], b"\x80\x04Pid\n."):
        with pytest.raises(RewardError, match="pickle: expected"):
            load_plain(data)
    for bad in (Evil(), np.load, io.BytesIO, getattr, RewardError):
        with pytest.raises(
            RewardError, match="pickle: expected containers, numbers and arrays; received"
        ):
            load_plain(pickle.dumps(bad))


URL = {"urls": ["http://127.0.0.1:1"]}


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"kind": "remot"}, "kind of mine: expected one of .*; did you mean 'remote'"),
        (
            {"kind": "remote", **URL, "takes": "clip"},
            "takes of mine: expected one of images, clips; received 'clip'; did you mean 'clips'",
        ),
        (
            {
                "kind": "remote",
                **URL,
                "takes": "clips",
                "protocol": "flow_grpo",
                "allow_pickle": True,
            },
            "reward mine: expected takes images with the protocol flow_grpo, which knows no clips; received clips",
        ),
        ({"kind": "remote"}, "reward mine: expected urls as a list of addresses; received \\[\\]"),
        (
            {"kind": "remote", "urls": "http://a"},
            "reward mine: urls: expected an array; received 'http://a'",
        ),
        (
            {"kind": "remote", **URL, "token": "x"},
            "option of mine: expected one of .*received 'token'.*'token_",
        ),
        (
            {"kind": "remote", **URL, "batch_size": 0},
            "reward mine: batch_size: expected >= 1; received 0",
        ),
        (
            {"kind": "remote", **URL, "batch_size": 2.5},
            "reward mine: batch_size: expected an integer; received 2.5",
        ),
        (
            {"kind": "remote", **URL, "retries": True},
            "reward mine: retries: expected an integer; received True",
        ),
        (
            {"kind": "remote", **URL, "timeout": 0},
            "reward mine: timeout: expected more than 0; received 0",
        ),
        (
            {"kind": "remote", **URL, "format": "jpeg"},
            "reward mine: format: expected one of png, rgb8; received 'jpeg'",
        ),
        (
            {"kind": "remote", **URL, "applies": "quote"},
            "expected one of all, quoted, geneval; received 'quote'",
        ),
        (
            {"kind": "remote", **URL, "protocol": "pickle"},
            "protocol: expected one of marble, flow_grpo",
        ),
        (
            {"kind": "remote", **URL, "protocol": "flow_grpo"},
            "reward mine: expected allow_pickle: true for the protocol",
        ),
        (
            {"kind": "openai", **URL},
            "reward mine: expected model, its name at the endpoint; received none",
        ),
        (
            {"kind": "openai", **URL, "model": "m", "preset": "x"},
            "reward mine: preset: expected one of .*unifiedreward",
        ),
        (
            {"kind": "openai", **URL, "model": "m", "prompt": "rate it"},
            r"expected \{prompt\} in the judge's text",
        ),
        (
            {"kind": "openai", **URL, "model": "m", "pattern": "("},
            "expected a regular expression as pattern; received",
        ),
        (
            {"kind": "openai", **URL, "model": "m", "pattern": "x"},
            "expected a group around the number in pattern",
        ),
        (
            {"kind": "openai", **URL, "model": "m", "low": 5, "high": 5},
            "expected a range with low < high and high > 0",
        ),
        (
            {"kind": "openai", **URL, "model": "m", "prompt": "{prompt}", "prompt_file": "x"},
            "prompt or prompt_file",
        ),
        (
            {"kind": "openai", **URL, "model": "m", "prompt_file": "nowhere"},
            "expected a text in .*nowhere; received",
        ),
        (
            {"kind": "function", "function": "marble_test_nowhere:f"},
            "expected a module marble_test_nowhere in",
        ),
        ({"kind": "function"}, "reward function: expected module:function; received ''"),
    ],
)
def test_entries_that_are_wrong(tmp_path, entry, message):
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, **entry)
    assert "\n" not in str(caught.value)


def test_functions_in_and_beside_the_catalogue(tmp_path):
    (tmp_path / "marble_test_catalogue.py").write_text(
        "def bright(image, prompt, metadata):\n    return image.mean()\n\n"
        "def wanted(prompt, metadata):\n    return prompt == 'a'\n"
    )
    one = load(
        tmp_path,
        kind="function",
        function="marble_test_catalogue:bright",
        applies="marble_test_catalogue:wanted",
    )
    np.testing.assert_array_equal(run(one).valid, [True, False, False, False, False])
    two = load_rewards(tmp_path, ["mine", "marble_test_catalogue:bright"])[1]
    assert two.name == "marble_test_catalogue:bright" and run(two).valid.all()
    assert load_rewards(None, ["marble_test_catalogue:bright"])[0].name == two.name
    with pytest.raises(
        InputError,
        match="expected every name once; received 'marble_test_catalogue:bright' 2 times",
    ):
        load_rewards(None, ["marble_test_catalogue:bright"] * 2)


def places(images, prompt, metadata):
    """Of every image, how many of its prompt's are darker."""
    means = images.mean((1, 2, 3))
    return [float((means < mean).sum()) for mean in means]


# Every image brighter than the one before.
BRIGHTER = np.arange(24, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 4, 3), 10, np.uint8)


@pytest.mark.parametrize("prompts", [["a"] * 24, ["a", "b", "c"] * 8])
def test_no_call_takes_the_images_of_a_prompt_apart(tmp_path, prompts):
    """24 images of one prompt have places 0 to 23, also where a call has 16; of three prompts 0 to 7 each."""
    with RewardServer([FunctionReward("mine", places)], options=ServerOptions(batch=5)) as server:
        remote = load(tmp_path, kind="remote", urls=[server.url])
        result = base.score(remote, BRIGHTER.astype(np.float32) / 255, prompts, [{}] * 24)
        assert remote.needs_full_group
        # As a run's start asks before there is an image; nothing is asked twice.
        server.close()
        remote.inquire()
    expected = [index // len(set(prompts)) for index in range(24)]
    np.testing.assert_array_equal(result.values, expected)


def test_whether_a_server_says_that_it_needs_groups(tmp_path):
    with RewardServer([FunctionReward("mine", places), Mean("other")]) as server:
        assert server.health()["groups"] == ["mine"]
        other = load(tmp_path, kind="remote", urls=[server.url], reward="other")
        other.inquire()
        assert not other.needs_full_group
    # Another project's server that has no such path.
    with Endpoint(lambda *_: (200, {}, b'{"scores": [1, 2, 3]}')) as server:
        remote = load(tmp_path, kind="remote", urls=[server.url])
        np.testing.assert_array_equal(run(remote, 3).values, [1, 2, 3])
        assert not remote.needs_full_group
    gone = load(tmp_path, kind="remote", urls=[server.url], retries=0, connect_timeout=1)
    with pytest.raises(RewardError, match="reward mine: http.*/health: .*refused"):
        gone.inquire()


@pytest.mark.parametrize(
    "body, groups",
    [
        (b'{"status": "ok"}', set()),
        (b"<html>fine</html>", set()),
        (b"", set()),
        (b'{"groups": ["a", "b"]}', {"a", "b"}),
    ],
)
def test_what_health_says_of_groups(body, groups):
    assert decode_groups(body) == groups


def test_groups_that_are_no_names():
    with pytest.raises(
        ProtocolError, match="health: expected groups as a list of names; received 1"
    ):
        decode_groups(b'{"groups": 1}')
