"""Conditioning of texts from memory, from disk, or from the text encoders, which are loaded only when a text is new.

On disk every text is a file, named by a hash of all that its values depend on: the contents of the encoders' and
tokenizers' files, the text, the number of T5 tokens and the dtype. So a folder can be shared by runs and models, and
nothing in it ever goes stale. After `fill`, a run needs no text encoder in memory.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from marble_jax.distributed import sharding
from marble_jax.errors import InputError
from marble_jax.families.sd3 import text
from marble_jax.families.sd3.text import TextEncoders
from marble_jax.types import Conditioning

MEMORY_BYTES = 1 << 30
"""Host memory for conditioning at hand; the longest unused goes first."""

_HASHES = "hashes.json"


class Embeddings:
    """Conditioning of texts, each computed once.

    Args:
      root: the model's directory.
      length: T5 tokens a prompt.
      dtype: of encoders and conditioning.
      t5: False leaves T5 out.
      cache: folder on disk; empty: computed values are kept in memory alone.
      load: loads the text encoders; by default those of `root`, split over the devices of this host.
      memory: bytes of host memory for values at hand.
    """

    def __init__(
        self,
        root: pathlib.Path,
        length: int,
        dtype: Any,
        *,
        t5: bool = True,
        cache: epath.PathLike = "",
        load: Callable[[], TextEncoders] | None = None,
        memory: int = MEMORY_BYTES,
    ):
        self._root, self._length, self._dtype, self._t5 = root, length, jnp.dtype(dtype), t5
        self._load = load or functools.partial(
            text.load_text_encoders, root, dtype, t5, place=sharding.place_over_host
        )
        self._encoders: TextEncoders | None = None
        self._memory = memory
        self._at_hand: collections.OrderedDict[str, tuple[np.ndarray, np.ndarray]] = (
            collections.OrderedDict()
        )
        self._bytes = 0
        self._cache = epath.Path(os.path.expanduser(os.fspath(cache))) if os.fspath(cache) else None
        self._stored: set[str] = set()
        self._key = b""
        if self._cache is not None:
            self._open(self._cache)

    def _open(self, cache: epath.Path) -> None:
        """Finds out which model this is, and what the folder holds of it."""
        try:
            cache.mkdir(parents=True, exist_ok=True)
            hashes = cache / _HASHES
            try:
                known = json.loads(hashes.read_text()) if hashes.exists() else {}
            except ValueError:
                known = {}
            found, files = text.identity(self._root, self._t5, known)
            if any(known.get(path) != entry for path, entry in files.items()):
                _write(hashes, json.dumps(known | files).encode())
        except OSError as error:
            raise InputError(
                f"embedding cache: expected a writable folder; received {cache} "
                f"({error.strerror or error})"
            ) from None
        described = [found, self._length, self._dtype.name]
        self._key = json.dumps(described).encode()
        self._folder = cache / hashlib.sha256(self._key).hexdigest()[:24]
        if self._folder.exists():
            self._stored = {
                p.name.removesuffix(".npz")
                for p in self._folder.iterdir()
                if p.name.endswith(".npz")
            }

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The different texts that have to be encoded before `texts` are at hand or on disk."""
        return [
            t
            for t in dict.fromkeys(texts)
            if t not in self._at_hand and self._name(t) not in self._stored
        ]

    def fill(
        self, texts: Sequence[str], progress: Callable[[int], None] = lambda count: None
    ) -> int:
        """Encodes what is missing; with a folder on disk, the encoders are dropped from memory then.

        Args:
          texts: all that will be asked for; given again after a kill, it goes on where it stopped.
          progress: called with the number of texts done.

        Returns:
          How many texts were encoded.

        Raises:
          InputError: the folder is not writable, or its disk too small.
        """
        wanted = self.missing(texts)
        done = 0
        while done < len(wanted):
            part = wanted[done : done + self.load().prompt_batch]
            found = self._encode(part)
            if self._cache is not None and not done:
                self._check_space(
                    sum(leaf.nbytes for leaf in found[part[0]]) * (len(wanted) - len(part))
                )
            done += len(part)
            progress(len(part))
        if self._cache is not None:
            self.release()
        return done

    def load(self) -> TextEncoders:
        """The text encoders, loaded unless they are in memory."""
        if self._encoders is None:
            self._encoders = self._load()
        return self._encoders

    def release(self) -> None:
        """Drops the text encoders; they are loaded again if a new text comes."""
        self._encoders = None

    @property
    def loaded(self) -> bool:
        """Whether the text encoders are in memory."""
        return self._encoders is not None

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """embeds [N, T, D] and pooled [N, P] of N texts.

        Raises:
          InputError: no text, or a damaged file on disk.
        """
        if isinstance(texts, str) or not texts:
            raise InputError(f"prompts: expected a list of one or more texts; received {texts!r}")
        rows = {t: row for row, t in enumerate(dict.fromkeys(texts))}
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        new = set(self.missing(rows))
        for t in rows:
            if t not in new:
                found[t] = self._at_hand[t] if t in self._at_hand else self._read(t)
        while new:
            batch = [t for t in rows if t in new][: self.load().prompt_batch]
            found |= self._encode(batch)
            new -= set(batch)
        for t in rows:
            self._keep(t, found[t])
        index = np.asarray([rows[t] for t in texts])
        embeds, pooled = (
            jnp.asarray(np.stack([found[t][part] for t in rows]))[index] for part in (0, 1)
        )
        return Conditioning(embeds, pooled)

    def _encode(self, texts: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        cond = jax.device_get(self._encoders.encode(texts, self._length))
        found = {
            t: (np.array(cond.embeds[i]), np.array(cond.pooled[i])) for i, t in enumerate(texts)
        }
        for t, value in found.items():
            if self._cache is not None:
                self._store(t, value)
            self._keep(t, value)
        return found

    def _keep(self, t: str, value: tuple[np.ndarray, np.ndarray]) -> None:
        if t in self._at_hand:
            self._at_hand.move_to_end(t)
            return
        self._at_hand[t] = value
        self._bytes += sum(leaf.nbytes for leaf in value)
        while self._bytes > self._memory and len(self._at_hand) > 1:
            _, old = self._at_hand.popitem(last=False)
            self._bytes -= sum(leaf.nbytes for leaf in old)

    def _name(self, t: str) -> str:
        return hashlib.sha256(self._key + b"\n" + t.encode("utf-8", "surrogatepass")).hexdigest()

    def _store(self, t: str, value: tuple[np.ndarray, np.ndarray]) -> None:
        import io

        buffer = io.BytesIO()
        # As bytes: NumPy's format does not know bfloat16.
        np.savez(
            buffer, **{name: leaf.view(np.uint8) for name, leaf in zip(("embeds", "pooled"), value)}
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(self._folder / f"{self._name(t)}.npz", buffer.getvalue())
        except OSError as error:
            raise InputError(
                f"embedding cache: expected space to write in {self._folder}; received "
                f"{error.strerror or error}"
            ) from None
        self._stored.add(self._name(t))

    def _read(self, t: str) -> tuple[np.ndarray, np.ndarray]:
        file = self._folder / f"{self._name(t)}.npz"
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
                return tuple(data[name].view(self._dtype) for name in ("embeds", "pooled"))
        except Exception as error:  # zip, format and file errors come in many kinds
            raise InputError(
                f"embedding cache: expected a readable {file}; received {type(error).__name__} (delete "
                "the file and start again)"
            ) from error

    def _check_space(self, needed: int) -> None:
        place = os.fspath(self._cache)
        if "://" in place:
            return
        free = shutil.disk_usage(place).free
        if needed > free:
            raise InputError(
                f"embedding cache: expected {needed / 1e9:.1f} GB of free space in {place}; received "
                f"{free / 1e9:.1f} GB"
            )


def _write(file: epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all, also when several processes write it at once."""
    partial = file.parent / f".{file.name}.{os.getpid()}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
