"""Kinds of rewards whose numbers come from servers and judges.

"geneval":  {"kind": "remote", "urls": ["http://10.0.0.7:8810"], "token_env": "REWARD_TOKEN", "batch_size": 32}
"judge":    {"kind": "openai", "urls": ["http://127.0.0.1:17140/v1"], "model": "UnifiedReward-7b-v1.5",
             "preset": "unifiedreward"}
"hpsv3":    {"kind": "hpsv3", "device": "cuda"}
"""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path
from typing import Any, cast

from marble_jax.errors import InputError, one_line, one_of
from marble_jax.rewards.base import CLIPS, IMAGES, Takes
from marble_jax.rewards.function import Applies, applies_rule
from marble_jax.rewards.http.access import read_token
from marble_jax.rewards.http.calls import Replicas
from marble_jax.rewards.http.judge import PATH, JudgeReward
from marble_jax.rewards.http.judge_numbers import SharedAnswers
from marble_jax.rewards.http.judge_questions import MEAN, PRESETS, Question
from marble_jax.rewards.http.post import CallPolicy
from marble_jax.rewards.http.remote import PROTOCOLS, RemoteReward
from marble_jax.rewards.registration import BuildContext, option, register_reward
from marble_jax.storage.files import local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallOptions:
    """Options of every kind that calls servers."""

    urls: tuple[str, ...] = option((), "addresses of servers that answer alike")
    token_env: str = option("", "environment variable that holds the token")
    token_file: str = option("", "file that holds the token")
    timeout: float = option(60.0, "seconds for a whole call", above=0)
    connect_timeout: float = option(5.0, "seconds for a connection", above=0)
    retries: int = option(3, "further attempts after the first", least=0)
    patience: float = option(
        100.0, "seconds to go on asking a server that is busy, whatever retries says", least=0
    )
    ca_file: str = option("", "certificates of authorities to trust besides the system's")
    pause: float = option(0.5, "seconds before the first of them; doubles with each", least=0)
    max_in_flight: int = option(4, "calls at the same time, over all servers", least=1, most=1024)
    applies: str = option(
        "all", "prompts it is asked about: all, quoted, geneval or module:function"
    )
    takes: str = option(
        IMAGES, "what is sent: images, or clips, each as a whole", choices=(IMAGES, CLIPS)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteOptions(CallOptions):
    """Options of the kind "remote"."""

    reward: str = option("", "its name at the server; the same by default")
    batch_size: int = option(16, "images a call, every frame of a clip counted", least=1)
    format: str = option("png", "of images: png or rgb8")
    protocol: str = option("marble", "this project's, or flow_grpo, of the older PyTorch servers")
    field: str = option("scores", "under flow_grpo, the field of the answer that holds the scores")
    allow_pickle: bool = option(False, "consent to flow_grpo, whose answers are pickles")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions(CallOptions):
    """Options of the kind "openai"; those of the question keep the preset's value where they are left out."""

    max_in_flight: int = option(8, "calls at the same time, over all servers", least=1, most=1024)
    model: str = option("", "its name at the endpoint")
    preset: str = option("", "question to start from; 'clip' by default where it takes clips")
    prompt: str | None = option(None, "text of the question, with {prompt} for the image's prompt")
    prompt_file: str = option("", "file beside rewards.json that holds the text")
    pattern: str | None = option(None, "regular expression whose first group is the number")
    field: str | None = option(None, "instead, the number's key in the answer's JSON object")
    numbers: dict[str, str] | None = option(
        None,
        "patterns of several numbers by name, each of which is a reward ENTRY_NAME; empty for a key of JSON",
    )
    number: str = option("", "the one of numbers that this entry is, or mean for all of them")
    answer: str | None = option(None, "number, or probability of an expected answer's token")
    expected: tuple[str, ...] | None = option(None, "answers whose probability is the score")
    against: tuple[str, ...] | None = option(
        None, "answers it is weighed against, p / (p + q); none for p itself"
    )
    questions: str | None = option(
        None, "key of the prompts' metadata with [question, answer] pairs, asked one by one"
    )
    combine: str | None = option(None, "mean or geometric mean over these")
    low: float | None = option(None, "smallest number")
    high: float | None = option(None, "largest number, whose score is 1")
    zero: float | None = option(None, "number whose score is 0")
    side: int | None = option(
        None, "pixels that images are resized to; 0 leaves them", least=0, most=8192
    )
    max_tokens: int | None = option(None, "of the answer", least=0)
    temperature: float | None = option(None, "of sampling", least=0)


def _replicas(name: str, options: CallOptions, path: str) -> Replicas:
    token = read_token(name, options.token_env, options.token_file)
    policy = CallPolicy(
        connect_seconds=options.connect_timeout,
        answer_seconds=options.timeout,
        retries=options.retries,
        patience_seconds=options.patience,
        ca_file=_certificates(name, options.ca_file),
        pause_seconds=options.pause,
        max_in_flight=options.max_in_flight,
    )
    return Replicas(name, list(options.urls), path, token, policy)


def _certificates(name: str, file: str) -> str:
    """A file of certificates. Raises InputError where it holds none."""
    if not file:
        return ""
    path = local_path(file)
    try:
        ssl.create_default_context(cafile=str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"reward {name}: ca_file: expected certificates in PEM; received {path} ({one_line(error)})"
        ) from None
    return str(path)


def _applies(name: str, options: CallOptions, context: BuildContext) -> Applies | None:
    if not options.applies:
        return None
    return applies_rule(name, options.applies, context.directory)


@register_reward("remote", RemoteOptions)
def build_remote(name: str, options: RemoteOptions, context: BuildContext) -> RemoteReward:
    """Builds a reward that a server computes."""
    applies = _applies(name, options, context)
    one_of(f"reward {name}: protocol", options.protocol, PROTOCOLS)
    # The older servers are called at the address itself, without a path.
    path, pickle_field = "/score", ""
    if options.protocol == "flow_grpo" and options.field:
        path, pickle_field = "", options.field
    return RemoteReward(
        name,
        _replicas(name, options, path),
        options.reward,
        options.batch_size,
        options.format,
        applies,
        pickle_field,
        options.allow_pickle,
        cast(Takes, options.takes),
    )


@register_reward("openai", JudgeOptions)
def build_judge(name: str, options: JudgeOptions, context: BuildContext) -> JudgeReward:
    """Builds a reward that a vision-language model behind an OpenAI-compatible endpoint gives."""
    applies = _applies(name, options, context)
    replicas = _replicas(name, options, PATH)
    question = _question(name, options, context)
    _check_number(name, options.number, question)
    shared = None
    if options.number:
        # Rewards of one answer share its endpoint, and with it how many calls are made at a time; one that is to be
        # called otherwise, with another token for instance, is another endpoint.
        how = [getattr(options, field.name) for field in dataclasses.fields(CallOptions)]
        judge = repr((how, options.model))
        shared = context.answers.setdefault(judge, SharedAnswers(replicas))
        replicas = shared.replicas
    takes = cast(Takes, options.takes)
    return JudgeReward(
        name, replicas, options.model, question, applies, takes, shared, options.number
    )


def _check_number(name: str, number: str, question: Question) -> None:
    """Checks that a judge's answer has the number that an entry is of.

    Raises:
      InputError: it has several, of which the entry names none, or it has no such number; or one of them is called as
        the mean of all is.
    """
    if MEAN in question.numbers:
        raise InputError(
            f"reward {name}: numbers: expected another name than {MEAN!r}, which stands for the mean of all; received "
            f"{', '.join(question.numbers)}"
        )
    if number and not question.numbers:
        raise InputError(
            f"reward {name}: number: expected with numbers, or a preset that has some; received {number!r}"
        )
    if question.numbers:
        one_of(f"reward {name}: number", number, (*question.numbers, MEAN))


def _question(name: str, options: JudgeOptions, context: BuildContext) -> Question:
    """Returns the preset's question with what the options change."""
    one_of(f"reward {name}: preset", options.preset, PRESETS)
    preset = PRESETS[options.preset]
    # The question about one image would be asked of all frames.
    if options.takes == CLIPS and not options.preset:
        preset = PRESETS["clip"]
    # An option that an entry leaves out is None and keeps what the preset says.
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(preset):
        value = getattr(options, field.name)
        if value is not None:
            changes[field.name] = value
    if options.prompt_file:
        if options.prompt:
            raise InputError(f"reward {name}: expected prompt or prompt_file; received both")
        text = _read_text(name, options.prompt_file, context)
        # An empty file leaves the preset's text.
        if text:
            changes["prompt"] = text
    return dataclasses.replace(preset, **changes)


def _read_text(name: str, file_name: str, context: BuildContext) -> str:
    file = (context.directory or Path()) / file_name
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"reward {name}: expected a text in {file}; received {type(error).__name__}"
        ) from None
