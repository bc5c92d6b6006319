"""A reward computed by a server: ours (`marble-jax reward serve`), or any that speaks `protocol`.

    {"kind": "remote", "urls": ["http://127.0.0.1:8810", "http://10.0.0.2:8810"], "token_env": "REWARD_TOKEN"}

Images travel as 8-bit PNG (or bare bytes), so a reward that looks at unrounded pixels scores a little differently
than beside the sampler. With `"protocol": "flow_grpo"` the client speaks the pickles of the older PyTorch servers, if
`allow_pickle` says so.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError, one_of
from marble_jax.rewards.base import Metadata, Reward, RewardError, to_uint8
from marble_jax.rewards.http import protocol
from marble_jax.rewards.http.calls import Replicas
from marble_jax.rewards.http.pickles import load_plain
from marble_jax.rewards.http.protocol import ProtocolError, Request
from marble_jax.rewards.workers.host_scorer import line
from marble_jax.types import Params

log = logging.getLogger(__name__)

PROTOCOLS = ("marble", "flow_grpo")


class RemoteReward(Reward):
    """Scores from a server. A host reward."""

    def __init__(
        self,
        name: str,
        replicas: Replicas,
        reward: str = "",
        batch_size: int = 16,
        image_format: str = "png",
        applies: Callable[[str, Metadata], bool] | None = None,
        old: str = "",
        allow_pickle: bool = False,
    ):
        """Builds the reward; calls nobody.

        Args:
          name: key of the reward.
          replicas: the servers.
          reward: its name there; `name` by default.
          batch_size: images a call.
          image_format: "png" or "rgb8".
          applies: which prompts the server is asked about; it can narrow that further.
          old: speak the pickle protocol of the older servers, and take the scores from this field of the answer:
            "scores" (GenEval) or "outputs" (UnifiedReward).
          allow_pickle: has to be True for that.

        Raises:
          InputError: a pickle protocol without consent, or an unknown image format.
        """
        one_of(f"reward {name}: format", image_format, protocol.FORMATS)
        if old and not allow_pickle:
            raise InputError(
                f"reward {name}: expected allow_pickle: true for the protocol flow_grpo, whose answers "
                "are pickles; received false"
            )
        if old:
            log.warning(
                "reward %s: answers are pickles; only plain containers, numbers and arrays are accepted, but "
                "use servers you trust",
                name,
            )
        super().__init__(name=name, kind="host")
        self._replicas, self._reward, self._batch_size = replicas, reward or name, batch_size
        self._format, self._applies, self._old = image_format, applies, old

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """What the configuration says."""
        return self._applies is None or bool(self._applies(prompt, metadata))

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`; a batch whose call fails is missing, and if all fail the last error is raised."""
        images, count = to_uint8(images), len(prompts)
        values, valid, applies = np.zeros(count), np.zeros(count, bool), np.ones(count, bool)
        parts = [
            slice(start, start + self._batch_size) for start in range(0, count, self._batch_size)
        ]
        ask = self._ask_old if self._old else self._ask
        answers = self._replicas.each(
            lambda part: ask(
                Request(self._reward, images[part], list(prompts[part]), list(metadata[part]))
            ),
            parts,
        )
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if len(errors) == len(parts):
            raise errors[-1]
        if errors:
            log.warning(
                "reward %s failed in %d of %d calls: %s",
                self.name,
                len(errors),
                len(parts),
                line(errors[-1]),
            )
        for part, answer in zip(parts, answers):
            if not isinstance(answer, Exception):
                values[part], valid[part], applies[part] = answer
        return np.where(valid, values, 0), valid, applies

    def _ask(self, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        body = self._replicas.call(
            protocol.encode_request(request, self._format), protocol.CONTENT_TYPE
        )
        try:
            return protocol.decode_scores(body, len(request.prompts))
        except ProtocolError as error:
            raise RewardError(str(error)) from error

    def _ask_old(self, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source: the reward clients of flow_grpo (`geneval_score`, `unifiedreward_score_remote`)."""
        files = [_jpeg(image) for image in request.images]
        body = pickle.dumps(
            {
                "images": files,
                "prompts": request.prompts,
                "only_strict": True,
                "meta_datas": [dict(m) for m in request.metadata],
            }
        )
        answer = load_plain(self._replicas.call(body, "application/octet-stream"))
        values, count = _numbers(answer, self._old), len(request.prompts)
        if values is None or values.shape != (count,):
            raise RewardError(
                f"answer: expected {count} numbers in {self._old!r}; received "
                f"{'none' if values is None else values.shape}"
            )
        return values, np.isfinite(values), np.ones(count, bool)


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def _numbers(answer: Any, field: str) -> np.ndarray | None:
    """The list or array of numbers in a field; None for anything else, which is not looked into."""
    found = answer.get(field) if isinstance(answer, dict) else None
    if isinstance(found, np.ndarray) and found.dtype.kind in "fiub":
        return found.astype(np.float64)
    if isinstance(found, (list, tuple)) and all(
        isinstance(v, (int, float, np.number)) for v in found
    ):
        return np.array([float(v) for v in found], np.float64)
    return None
