"""Entries of `rewards.json` whose numbers come from outside the project: servers, judges, a user's own function.

"geneval":  {"kind": "remote", "urls": ["http://10.0.0.7:8810"], "token_env": "REWARD_TOKEN", "batch_size": 32}
"judge":    {"kind": "openai", "urls": ["http://127.0.0.1:17140/v1"], "model": "UnifiedReward-7b-v1.5",
             "preset": "unifiedreward"}
"sharp":    {"kind": "function", "function": "my_rewards:sharpness", "applies": "all"}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marble_jax.errors import InputError, one_of
from marble_jax.rewards.base import Reward
from marble_jax.rewards.function import FunctionReward, applies_rule, load_function
from marble_jax.rewards.http.access import read_token
from marble_jax.rewards.http.calls import Replicas
from marble_jax.rewards.http.judge import PATH, PRESETS, JudgeReward
from marble_jax.rewards.http.post import CallPolicy
from marble_jax.rewards.http.remote import PROTOCOLS, RemoteReward

_CALLS: dict[str, Any] = {
    "urls": [],
    "token_env": "",
    "token_file": "",
    "timeout": 60.0,
    "connect_timeout": 5.0,
    "retries": 3,
    "pause": 0.5,
    "max_in_flight": 4,
    "applies": "all",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "remote": _CALLS
    | {
        "reward": "",
        "batch_size": 16,
        "format": "png",
        "protocol": "marble",
        "field": "scores",
        "allow_pickle": False,
    },
    "openai": _CALLS
    | {
        "model": "",
        "preset": "",
        "prompt": "",
        "prompt_file": "",
        "pattern": "",
        "field": "",
        "low": 0.0,
        "high": 0.0,
        "side": 0,
        "max_tokens": 0,
        "temperature": 0.0,
        "max_in_flight": 8,
    },
    "function": {"function": "", "applies": ""},
}
"""Options of each kind with their defaults; an empty or zero option of a judge leaves its preset's value."""
LEAST = {
    "batch_size": 1,
    "max_in_flight": 1,
    "retries": 0,
    "pause": 0,
    "side": 0,
    "max_tokens": 0,
    "temperature": 0,
}
OPTIONS = {kind: set(defaults) for kind, defaults in DEFAULTS.items()}


def build(name: str, kind: str, entry: Mapping[str, Any], directory: Path | None) -> Reward:
    """A reward from its entry.

    Args:
      name: key of the reward.
      kind: "remote", "openai" or "function".
      entry: its options.
      directory: where `rewards.json` lies; files and modules are looked for there.

    Raises:
      InputError: an option that is unknown or does not fit; a token, file, module or function that is not there.
    """
    options = _checked(name, DEFAULTS[kind], entry)
    rule = applies_rule(name, options["applies"], directory) if options["applies"] else None
    if kind == "function":
        return FunctionReward(name, load_function(options["function"], directory), rule)
    token = read_token(name, options["token_env"], options["token_file"])
    policy = CallPolicy(
        options["connect_timeout"],
        options["timeout"],
        options["retries"],
        options["pause"],
        options["max_in_flight"],
    )
    if kind == "openai":
        replicas = Replicas(name, options["urls"], PATH, token, policy)
        return JudgeReward(
            name, replicas, options["model"], _question(name, options, entry, directory), rule
        )
    one_of(f"reward {name}: protocol", options["protocol"], PROTOCOLS)
    old = options["field"] if options["protocol"] == "flow_grpo" else ""
    replicas = Replicas(name, options["urls"], "" if old else "/score", token, policy)
    return RemoteReward(
        name,
        replicas,
        options["reward"],
        options["batch_size"],
        options["format"],
        rule,
        old,
        options["allow_pickle"],
    )


def _question(
    name: str, options: dict[str, Any], entry: Mapping[str, Any], directory: Path | None
) -> Any:
    one_of(f"reward {name}: preset", options["preset"], PRESETS)
    if options["prompt_file"]:
        if options["prompt"]:
            raise InputError(f"reward {name}: expected prompt or prompt_file; received both")
        file = (directory or Path()) / options["prompt_file"]
        try:
            options["prompt"] = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(
                f"reward {name}: expected a text in {file}; received {type(error).__name__}"
            ) from None
    base = PRESETS[options["preset"]]
    given = {
        field.name: options[field.name] for field in dataclasses.fields(base) if field.name in entry
    }
    return dataclasses.replace(
        base, **given | ({"prompt": options["prompt"]} if options["prompt"] else {})
    )


def _checked(name: str, defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults, of the defaults' types."""
    options = dict(defaults)
    for key, value in entry.items():
        one_of(f"reward {name}: option", key, defaults)
        default = defaults[key]
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise InputError(
                f"reward {name}: {key}: expected {type(default).__name__}; received {value!r}"
            )
        least = LEAST.get(key)
        if (
            least is not None
            and value < least
            or key in ("timeout", "connect_timeout")
            and not value > 0
        ):
            raise InputError(
                f"reward {name}: {key}: expected {'more than 0' if least is None else f'>= {least}'}; "
                f"received {value!r}"
            )
        options[key] = value
    return options
