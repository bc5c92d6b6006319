"""The reward server: any reward of this project behind HTTP, for `remote.RemoteReward` and whoever speaks `protocol`.

What a client can cost is bounded: what `connections` bounds, requests in memory, images, pixels before anything is
decompressed, seconds for its scores to be made. A call that hangs is given up and its thread replaced.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError, nearest, one_line
from marble_jax.rewards import base
from marble_jax.rewards.base import CLIPS, Reward
from marble_jax.rewards.http import protocol
from marble_jax.rewards.http.access import is_loopback
from marble_jax.rewards.http.background import BackgroundServer
from marble_jax.rewards.http.connections import DEFAULT_OPTIONS, ServerOptions
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.rewards.http.protocol import Request
from marble_jax.rewards.workers.threads import Expired, Pool, TooManyLost
from marble_jax.validation import short
from marble_jax.version import VERSION

log = logging.getLogger(__name__)


class _OwnFault(Exception):
    """A fault of the server's, not of the reward's."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class RewardServer(BackgroundServer):
    """Serves rewards until closed; a context manager.

    Attributes:
      broken: set when so many calls hang that the process is of no use any more.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        host: str = "127.0.0.1",
        port: int = 0,
        options: ServerOptions = DEFAULT_OPTIONS,
    ):
        """Binds the address and begins to answer.

        Args:
          rewards: with distinct names.
          host: address to bind.
          port: to bind; 0 takes a free one, see `url`.
          options: how it works.

        Raises:
          InputError: an address that cannot be bound, or one that others can reach without a token.
        """
        if not options.token and not is_loopback(host):
            raise InputError(
                f"--host: expected a loopback address such as 127.0.0.1, or a token with any other; "
                f"received {host!r} without a token"
            )
        self._rewards = {reward.name: reward for reward in rewards}
        self.broken = threading.Event()
        self._pool = Pool(options.workers, "reward server")
        self._places = threading.BoundedSemaphore(options.workers + options.waiting)
        self._num_requests = 0
        self._num_requests_lock = threading.Lock()
        # One request at a time on the device: two would need the memory of both.
        self._device = threading.Lock()
        try:
            super().__init__("reward server", host, port, options)
        except InputError:
            self._pool.close()
            raise
        self.start()

    @property
    def url(self) -> str:
        """The address clients use."""
        return self.origin

    def close(self) -> None:
        """Stops answering and ends the threads; calls that hang are left behind."""
        super().close()
        self._pool.close()

    def health(self) -> dict[str, Any]:
        """The answer to `/health` for who may know."""
        num_hanging = self._pool.lost
        status = "ok"
        if num_hanging:
            status = "degraded"
        if self.broken.is_set():
            status = "broken"
        return {
            "status": status,
            "version": VERSION,
            "rewards": sorted(self._rewards),
            "groups": sorted(
                name for name, reward in self._rewards.items() if reward.needs_full_group
            ),
            "requests": self._num_requests,
            "workers": self.options.workers,
            "hanging": num_hanging,
        }

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A context for one whole request that waits for a worker.

        Raises:
          ProtocolError: there are too many.
        """
        if not self._places.acquire(blocking=False):
            raise ProtocolError(
                503, "server: expected fewer requests at a time; received one too many"
            )
        with self._num_requests_lock:
            self._num_requests += 1
        try:
            yield
        finally:
            with self._num_requests_lock:
                self._num_requests -= 1
            self._places.release()

    def score(self, body: bytes, is_gone: Callable[[], bool] = lambda: False) -> bytes:
        """See `ConnectionServer.score`. Requests are scored in the order in which they came.

        Raises:
          ProtocolError: a malformed request, no such reward, or the reward failed or took too long.
        """
        # The head is looked at here; images are decompressed by the worker, so that those that wait stay small.
        name = protocol.reward_of(body)
        reward = self._rewards.get(name)
        if reward is None:
            raise ProtocolError(
                404,
                f"reward: expected one of {', '.join(sorted(self._rewards))}; received "
                f"{short(name)}{nearest(name, self._rewards)}",
            )
        came = time.monotonic()
        future = self._pool.submit(self._decode_and_score, reward, body, came, is_gone)
        seconds = self.options.score_seconds
        try:
            return self._pool.result(future, seconds)
        except Expired:
            raise ProtocolError(
                504, f"reward {reward.name}: expected scores within {seconds:g} s; received none"
            ) from None
        except ProtocolError:
            raise
        except _OwnFault as fault:
            raise fault.error from fault
        except TooManyLost as error:
            # Threads that hang cannot be ended; a new process can.
            self.broken.set()
            raise ProtocolError(503, f"reward {reward.name}: {one_line(error)}"[:300]) from None
        # A reward is foreign code: whatever it raises, even on its way out of the program, costs
        # one answer.
        except BaseException as error:
            reason = one_line(error)
            log.warning("reward %s failed: %s", reward.name, reason)
            raise ProtocolError(500, f"reward {reward.name}: {reason}"[:300]) from None

    def _decode_and_score(
        self, reward: Reward, body: bytes, came: float, is_gone: Callable[[], bool]
    ) -> bytes:
        """The answer of a reward, in a worker thread."""
        waited = time.monotonic() - came
        # Nobody would read the answer: a client that gave up asks again.
        if is_gone() or waited > self.options.queue_seconds:
            raise ProtocolError(
                503, f"server: expected a free worker within {self.options.queue_seconds:g} s"
            )
        try:
            request = protocol.decode_request(body, self.options.limits)
        except ProtocolError:
            raise
        except Exception as error:
            raise _OwnFault(error) from error
        try:
            base.check_frames(reward, protocol.num_frames_of(request.images))
        except InputError as error:
            # Sent to a reward that cannot take it: no fault of either's, and no use in asking again.
            raise ProtocolError(400, str(error)) from None
        return self._score(reward, request)

    def _score(self, reward: Reward, request: Request) -> bytes:
        batch = self.options.batch
        # Scores of a group depend on all of its images, which a cut would take apart.
        if not batch or reward.needs_full_group:
            batch = len(request.images)
        results = []
        for start in range(0, len(request.images), batch):
            results.append(self._score_part(reward, _part(request, start, start + batch)))
        values, valid, failed = (np.concatenate(column) for column in zip(*results))
        # A sample is neither valid nor failed exactly where the reward does not apply.
        return protocol.encode_scores(values, valid, valid | failed)

    def _score_part(self, reward: Reward, request: Request) -> base.Result:
        images = request.images.astype(np.float32) / 255
        if reward.kind == "host":
            if request.fps is not None and reward.takes == CLIPS:
                reward = _at_rate(reward, request)
            return base.score(reward, images, request.prompts, request.metadata)
        return self._score_on_device(reward, images, request)

    def _score_on_device(self, reward: Reward, images: np.ndarray, request: Request) -> base.Result:
        count = len(images)
        # Filled up to a power of two: programs are compiled for few batch sizes, not for each that
        # a client sends.
        padded_size = 1 << (count - 1).bit_length()
        rows = np.arange(padded_size) % count
        prompts = [request.prompts[i] for i in rows]
        metadata = [request.metadata[i] for i in rows]
        with self._device:
            result = base.score(reward, jnp.asarray(images[rows]), prompts, metadata)
        return base.Result(
            result.values[:count],
            result.valid[:count],
            result.failed[:count],
        )


def _at_rate(reward: Reward, request: Request) -> Reward:
    """A copy of a reward that knows the frame rate of a request's clips: other threads may score those of another."""
    copied = copy.copy(reward)
    num_frames = protocol.num_frames_of(request.images)
    copied.frames_per_second = base.seen_rate(reward, num_frames, request.fps)
    return copied


def _part(request: Request, start: int, end: int) -> Request:
    """Some images or clips of a request, with their prompts and metadata."""
    return Request(
        request.reward,
        request.images[start:end],
        request.prompts[start:end],
        request.metadata[start:end],
        request.fps,
    )
