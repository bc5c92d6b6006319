"""A reward computed by a server: ours (`marble-jax reward serve`), or any that speaks `protocol`.

    {"kind": "remote", "urls": ["http://127.0.0.1:8810", "http://10.0.0.2:8810"], "token_env": "REWARD_TOKEN"}

Images travel as 8-bit PNG (or bare bytes), so a reward that looks at unrounded pixels scores a little differently
than beside the sampler. With `"takes": "clips"` the server is sent whole clips (version 2 of the protocol) and gives
each a score; else it is sent the frames that `rewards.frames` chooses, as images. With `"protocol": "flow_grpo"` the
client speaks the pickles of the older PyTorch servers, if `allow_pickle` says so.

Where the server's `/health` says that the reward compares the images of a prompt, no call takes these apart.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from marble_jax.batches import pack_groups
from marble_jax.errors import InputError, one_of
from marble_jax.rewards.base import CLIPS, IMAGES, Metadata, Reward, RewardError, Takes
from marble_jax.rewards.http import protocol
from marble_jax.rewards.http.calls import Replicas, require_an_answer
from marble_jax.rewards.http.images import FORMATS
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.rewards.http.pickles import load_plain
from marble_jax.rewards.http.protocol import Request
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params

log = logging.getLogger(__name__)

PROTOCOLS = ("marble", "flow_grpo")
"""Languages of a client: `protocol`, or the older servers' pickles."""

HEALTH = "/health"
"""Path at which a server says what it has."""
_OF_VERSION_1 = "expected version 1;"
"""In what a server that knows no clips answers to one."""
_Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""values [N], valid bool [N] and applies bool [N], as `Reward.score` returns them."""


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
        pickle_field: str = "",
        allow_pickle: bool = False,
        takes: Takes = IMAGES,
    ):
        """Builds the reward; calls nobody.

        Args:
          name: key of the reward.
          replicas: the servers.
          reward: its name there; `name` by default.
          batch_size: images a call, every frame of a clip counted; at least one clip, or all those of a prompt where
            the reward compares them.
          image_format: "png" or "rgb8".
          applies: which prompts the server is asked about; it can narrow that further.
          pickle_field: speak the pickle protocol of the older servers, and take the scores from this field of the
            answer: "scores" (GenEval) or "outputs" (UnifiedReward); empty speaks `protocol`.
          allow_pickle: has to be True for pickles.
          takes: "images", or "clips" to send clips as they are.

        Raises:
          InputError: a pickle protocol without consent or with clips, or an unknown image format.
        """
        one_of(f"reward {name}: format", image_format, FORMATS)
        if pickle_field and takes == CLIPS:
            raise InputError(
                f"reward {name}: expected takes images with the protocol flow_grpo, which knows no clips; "
                f"received {takes}"
            )
        if pickle_field and not allow_pickle:
            raise InputError(
                f"reward {name}: expected allow_pickle: true for the protocol flow_grpo, whose answers "
                "are pickles; received false"
            )
        if pickle_field:
            log.warning(
                "reward %s: answers are pickles; only plain containers, numbers and arrays are accepted, but "
                "use servers you trust",
                name,
            )
        super().__init__(name=name, kind="host", takes=takes)
        self._replicas = replicas
        self._reward = reward or name
        self._batch_size = batch_size
        self._format = image_format
        self._applies = applies
        self._pickle_field = pickle_field
        # The older servers have no word for what they need.
        self._has_inquired = bool(pickle_field)

    def inquire(self) -> None:
        """Asks the server, once, whether the reward compares the images of a prompt; see `Reward.inquire`."""
        if self._has_inquired:
            return
        try:
            groups = protocol.decode_groups(self._replicas.get(HEALTH))
        except (RewardError, ProtocolError) as error:
            raise RewardError(f"reward {self.name}: {error}") from error
        self.needs_full_group = self._reward in groups
        self._has_inquired = True

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """Whether the configuration has the server asked about a prompt."""
        if self._applies is None:
            return True
        return bool(self._applies(prompt, metadata))

    def score(
        self, params: Params, images: Any, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> _Columns:
        """See `Reward.score`; a batch whose call fails is missing.

        Raises:
          Exception: every call failed; the last error.
        """
        images = to_uint8(images)
        count = len(prompts)
        size = max(1, self._batch_size // protocol.num_frames_of(images))
        # Every image is a group of its own where a reward looks at one after the other.
        labels: Sequence[Any] = prompts if self.needs_full_group else range(count)
        parts = [np.array(part) for part in pack_groups(labels, size)]
        ask = self._ask
        if self._pickle_field:
            ask = self._ask_by_pickle

        def ask_about(part: np.ndarray) -> _Columns:
            request = Request(
                self._reward,
                images[part],
                [prompts[i] for i in part],
                [metadata[i] for i in part],
                self.frames_per_second,
            )
            return ask(request)

        answers = self._replicas.map(ask_about, parts)
        require_an_answer(self.name, answers, "in %d of %d calls")
        # Where a call failed nothing is valid and everything applies, which counts as failed.
        values, valid, applies = np.zeros(count), np.zeros(count, bool), np.ones(count, bool)
        for part, answer in zip(parts, answers):
            if not isinstance(answer, Exception):
                values[part], valid[part], applies[part] = answer
        # The answers hold NaN where there is no score.
        return np.where(valid, values, 0), valid, applies

    def _ask(self, request: Request) -> _Columns:
        """One call in this project's protocol."""
        message = protocol.encode_request(request, self._format)
        try:
            answer = self._replicas.call(message, protocol.CONTENT_TYPE)
        except RewardError as error:
            if protocol.num_frames_of(request.images) > 1 and _OF_VERSION_1 in str(error):
                raise RewardError(
                    f"reward {self.name}: expected a server of protocol version 2, which takes clips; received "
                    f"one of version 1, which takes images (takes: images sends it frames)"
                ) from error
            raise
        try:
            return protocol.decode_scores(answer, len(request.prompts))
        except ProtocolError as error:
            raise RewardError(str(error)) from error

    def _ask_by_pickle(self, request: Request) -> _Columns:
        """One call in the protocol of the older servers.

        Source: the reward clients of flow_grpo (`geneval_score`, `unifiedreward_score_remote`).
        """
        message = _pickled(request)
        answer = load_plain(self._replicas.call(message, "application/octet-stream"))
        values = _numbers(answer, self._pickle_field)
        count = len(request.prompts)
        if values is None or values.shape != (count,):
            received = "none"
            if values is not None:
                received = str(values.shape)
            raise RewardError(
                f"answer: expected {count} numbers in {self._pickle_field!r}; received {received}"
            )
        # These servers have no word for a prompt to which they do not apply.
        return values, np.isfinite(values), np.ones(count, bool)


def _pickled(request: Request) -> bytes:
    """A request as the older servers read it."""
    return pickle.dumps(
        {
            "images": [_jpeg(image) for image in request.images],
            "prompts": request.prompts,
            "only_strict": True,
            "meta_datas": [dict(metadata) for metadata in request.metadata],
        }
    )


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def _numbers(answer: Any, field: str) -> np.ndarray | None:
    """The numbers in a field, as float64; None for anything but a list or array of numbers."""
    if not isinstance(answer, dict):
        return None
    numbers = answer.get(field)
    if isinstance(numbers, (list, tuple)):
        return _from_list(numbers)
    # Booleans, integers and floats; texts that look like numbers would be converted as well.
    if isinstance(numbers, np.ndarray) and numbers.dtype.kind in "fiub":
        return numbers.astype(np.float64)
    return None


def _from_list(numbers: Sequence[Any]) -> np.ndarray | None:
    values = np.zeros(len(numbers))
    for index, number in enumerate(numbers):
        if not isinstance(number, (int, float, np.number)):
            return None
        values[index] = float(number)
    return values
