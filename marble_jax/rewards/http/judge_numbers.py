"""Several rewards from one answer of a judge: an entry for each number, and requests that are made once.

    {"unified": {"kind": "openai", "urls": ["http://127.0.0.1:17140/v1"], "model": "UnifiedReward-2.0",
                 "preset": "unifiedreward2"}}

stands for the rewards `unified_alignment`, `unified_coherence` and `unified_style`. With `"number": "style"` the entry
is one reward, of that number; with `"number": "mean"` their mean.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from marble_jax.errors import InputError
from marble_jax.rewards.http.calls import Replicas
from marble_jax.rewards.http.judge_questions import PRESETS

KIND = "openai"
MOST_ANSWERS = 8192
"""Answers that are remembered: those of a few rollouts of large runs."""


def numbers_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the named numbers of an entry or of its preset; empty for a judge of one number, and for other kinds."""
    if entry.get("kind") != KIND:
        return {}
    numbers = entry.get("numbers")
    if numbers is None:
        # Of another form, as numbers below, it is refused where options are read.
        name = entry.get("preset")
        preset = PRESETS.get(name if isinstance(name, str) else "", PRESETS[""])
        return preset.numbers
    return numbers if isinstance(numbers, dict) else {}


def expand(entries: Mapping[str, dict[str, Any]], source: object) -> dict[str, dict[str, Any]]:
    """Returns entries with one in place of each judge's number.

    Args:
      entries: of `rewards.json`, by name.
      source: names the file in errors.

    Raises:
      InputError: a name that two entries come to.
    """
    expanded: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        numbers = {} if "number" in entry else numbers_of(entry)
        parts = {name: entry}
        if numbers:
            parts = {f"{name}_{number}": entry | {"number": number} for number in numbers}
        for part, of_part in parts.items():
            if part in expanded or (part != name and part in entries):
                raise InputError(
                    f"{source}: expected every name once; received {part!r}, which {name!r} comes to as well"
                )
            expanded[part] = of_part
    return expanded


class SharedAnswers:
    """Answers of one endpoint by request: rewards that ask the same are answered once, also at the same time.

    Attributes:
      replicas: the endpoints.
    """

    def __init__(self, replicas: Replicas, most: int = MOST_ANSWERS):
        self.replicas = replicas
        self._most = most
        self._answers: OrderedDict[bytes, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def call(self, request: bytes, ask: Callable[[bytes], bytes]) -> bytes:
        """Returns the answer to a request, which is made by the first that asks.

        Raises:
          Exception: what `ask` raised; the next one to ask makes the request again.
        """
        key = hashlib.sha256(request).digest()
        with self._lock:
            answer = self._answers.get(key)
            is_first = answer is None
            if answer is None:
                answer = self._answers[key] = Future()
                while len(self._answers) > self._most:
                    self._answers.popitem(last=False)
        if not is_first:
            return answer.result()
        try:
            answer.set_result(ask(request))
        except BaseException as error:
            self._forget(key, answer)
            answer.set_exception(error)
        return answer.result()

    def forget(self, request: bytes) -> None:
        """Has the request made again: its answer was of no use."""
        with self._lock:
            self._answers.pop(hashlib.sha256(request).digest(), None)

    def _forget(self, key: bytes, answer: Future[bytes]) -> None:
        with self._lock:
            if self._answers.get(key) is answer:
                del self._answers[key]
