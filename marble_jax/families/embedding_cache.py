"""Conditioning of texts from memory, from disk, or from the text encoders, which are loaded only when a text is new.

On disk every text is a file, named by a hash of all that its values depend on: the contents of the encoders' and
tokenizers' files, the text, the number of tokens and the dtype. So a folder can be shared by runs and models, and
nothing in it ever goes stale. After `fill`, a run needs no text encoder in memory.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import os
import pathlib
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from marble_jax import distributed
from marble_jax.distributed.sharding import HEAD_WIDTH
from marble_jax.errors import InputError
from marble_jax.families.base import Conditioning, Family, TextEncoders
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.families.trimmed_rows import Trimmed, trim
from marble_jax.storage.files import read_json_or_empty
from marble_jax.weights.content_hash import content_hash

MEMORY_BYTES = 1 << 30
"""Host memory for conditioning at hand; the longest unused goes first."""

READERS = 16
"""Files read at once: one from a bucket takes much longer to come than to read."""

_FORMAT = 2
"""Version of the files, and part of their names: another one makes other files."""

Value = dict[str, Trimmed]
"""Conditioning of one text: named arrays without the sample axis, nor rows of zeros at their end."""


class EmbeddingCache:
    """Conditioning of texts, each computed once.

    Args:
      family: of the model.
      root: the model's directory.
      max_sequence_length: tokens a prompt.
      dtype: of encoders and conditioning.
      omit: component names of text encoders to leave out.
      folder: folder on disk; empty: computed values are kept in memory alone.
      load: loads the text encoders; by default those of `root`, split over the devices of this host.
      memory: bytes of host memory for values at hand.
    """

    def __init__(
        self,
        family: Family,
        root: pathlib.Path,
        max_sequence_length: int,
        dtype: Any,
        *,
        omit: Sequence[str] = (),
        folder: epath.PathLike = "",
        load: Callable[[], TextEncoders] | None = None,
        memory: int = MEMORY_BYTES,
    ):
        self._family, self._root, self._omit = family, root, tuple(omit)
        self._length, self._dtype = max_sequence_length, jnp.dtype(dtype)
        if load is None:
            load = functools.partial(
                family.open_text_encoders, root, dtype, self._omit, place=self._placer
            )
        self._load = load
        self._encoders: TextEncoders | None = None
        self._memory = memory
        self._values: collections.OrderedDict[str, Value] = collections.OrderedDict()
        self._bytes = 0
        self._cache: epath.Path | None = None
        self._stored: set[str] = set()
        self._key = b""
        if os.fspath(folder):
            self._cache = epath.Path(os.path.expanduser(os.fspath(folder)))
            self._folder = self._open(self._cache)
            self.rescan()

    def _placer(self, component: str) -> Any:
        """What splits a text encoder's weights over the devices of this host; None for one device."""
        return self._family.component_rules(component, HEAD_WIDTH).place_over_host()

    def _open(self, cache: epath.Path) -> epath.Path:
        """Finds out which model this is; returns its folder."""
        try:
            cache.mkdir(parents=True, exist_ok=True)
            identity = self._identity(cache / _hashes_name())
        except OSError as error:
            raise InputError(
                f"embedding cache: expected a writable folder; received {cache} "
                f"({error.strerror or error})"
            ) from None
        key = json.dumps([_FORMAT, identity, self._length, self._dtype.name])
        self._key = key.encode()
        digest = hashlib.sha256(self._key).hexdigest()
        return cache / digest[:24]

    def rescan(self) -> None:
        """Takes note of what is on disk by now, such as texts that other processes have encoded."""
        if self._cache is None or not self._folder.exists():
            return
        # Listed as a whole: looking for each text on a network disk takes longer than encoding it.
        for file in self._folder.iterdir():
            if file.name.endswith(".npz"):
                self._stored.add(file.name.removesuffix(".npz"))

    def _identity(self, hashes: epath.Path) -> str:
        """Hash of the files that the conditioning depends on; `hashes` remembers those of files seen before."""
        known = read_json_or_empty(hashes)
        components = self._family.text_components(self._root, self._omit)
        identity, files = content_hash(self._root, components, known)
        # Hashes of other models stay; written only when some are new, as runs share the file.
        merged = known | files
        if merged != known:
            _write(hashes, json.dumps(merged).encode())
        return identity

    def cut(self, texts: Sequence[str]) -> list[tuple[PromptLimit, list[str]]]:
        """Returns what each text encoder reads at most, and which of the texts are longer, where some are.

        Raises:
          InputError: damaged tokenizers, or a text that the model does not take.
        """
        found = []
        for limit in self._family.prompt_limits(self._root, self._length, self._omit):
            longer = limit.cut(texts)
            if longer:
                found.append((limit, longer))
        return found

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The different texts that have to be encoded before `texts` are in memory or on disk."""
        missing = []
        for text in dict.fromkeys(texts):
            if text not in self._values and self._name(text) not in self._stored:
                missing.append(text)
        return missing

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
            batch_size = self.load().prompt_batch
            part = wanted[done : done + batch_size]
            values = self._encode(part)
            if self._cache is not None and done == 0:
                # The first batch tells how large a value is.
                size = _num_bytes(values[part[0]])
                self._check_space(size * (len(wanted) - len(part)))
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
    def place(self) -> str:
        """The folder on disk that runs share; empty without one."""
        return "" if self._cache is None else os.fspath(self._cache)

    @property
    def loaded(self) -> bool:
        """Whether the text encoders are in memory."""
        return self._encoders is not None

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of N texts, named arrays [N, ...].

        Raises:
          InputError: no text, or a damaged file on disk.
        """
        if isinstance(texts, str) or not texts:
            raise InputError(f"prompts: expected a list of one or more texts; received {texts!r}")
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        values = self._values_of(list(rows))
        for text in rows:
            self._keep(text, values[text])
        index = np.asarray([rows[text] for text in texts])
        cond = {}
        for name in values[texts[0]]:
            # Stacked on the host and repeated on the device: a prompt's images share one copy on the way there.
            stacked = np.stack([values[text][name].whole() for text in rows])
            cond[name] = jnp.asarray(stacked)[index]
        return cond

    def _values_of(self, texts: list[str]) -> dict[str, Value]:
        """Values of different texts, wherever they come from."""
        new = self.missing(texts)
        values: dict[str, Value] = {}
        stored = []
        for text in texts:
            if text in self._values:
                values[text] = self._values[text]
            elif text not in new:
                stored.append(text)
        with ThreadPoolExecutor(READERS) as pool:
            values |= zip(stored, pool.map(self._read, stored))
        while new:
            batch_size = self.load().prompt_batch
            values |= self._encode(new[:batch_size])
            new = new[batch_size:]
        return values

    def _encode(self, texts: Sequence[str]) -> dict[str, Value]:
        """Encodes texts, and keeps what comes of it in memory and on disk."""
        cond = self.load().encode(texts, self._length)
        cond = jax.device_get(cond)
        values: dict[str, Value] = {}
        for i, text in enumerate(texts):
            values[text] = {name: trim(array[i]) for name, array in cond.items()}
        for text, value in values.items():
            if self._cache is not None:
                self._store(text, value)
            self._keep(text, value)
        return values

    def _keep(self, text: str, value: Value) -> None:
        """Keeps a value in memory, and drops the longest unused ones beyond the limit."""
        if text in self._values:
            self._values.move_to_end(text)
            return
        self._values[text] = value
        self._bytes += _num_bytes(value)
        while self._bytes > self._memory and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self._bytes -= _num_bytes(oldest)

    def _name(self, text: str) -> str:
        """Name of a text's file: a hash, as a text may be longer than a name and hold any character."""
        # A text read from a damaged file may hold half a surrogate pair, which is no valid UTF-8.
        encoded = text.encode("utf-8", "surrogatepass")
        return hashlib.sha256(self._key + b"\n" + encoded).hexdigest()

    def _file(self, text: str) -> epath.Path:
        return self._folder / f"{self._name(text)}.npz"

    def _store(self, text: str, value: Value) -> None:
        """Writes a value to disk. Raises InputError where that fails."""
        file = self._file(text)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(file, _to_bytes(value))
        except OSError as error:
            raise InputError(
                f"embedding cache: expected space to write in {self._folder}; received "
                f"{error.strerror or error}"
            ) from None
        self._stored.add(self._name(text))

    def _read(self, text: str) -> Value:
        """Reads a value from disk. Raises InputError where its file is damaged."""
        file = self._file(text)
        try:
            with file.open("rb") as handle:
                return _from_bytes(handle)
        except Exception as error:
            # Zip, format and file errors come in many kinds.
            raise InputError(
                f"embedding cache: expected a readable {file}; received {type(error).__name__} (delete "
                "the file and start again)"
            ) from error

    def _check_space(self, needed: int) -> None:
        """Raises InputError unless the disk has room for `needed` bytes; a bucket always has."""
        place = os.fspath(self._cache) if self._cache is not None else ""
        if "://" in place:
            return
        free = shutil.disk_usage(place).free
        if needed > free:
            raise InputError(
                f"embedding cache: expected {needed / 1e9:.1f} GB of free space in {place}; received "
                f"{free / 1e9:.1f} GB"
            )


def _hashes_name() -> str:
    """Name of the file that remembers the hashes of a model's files."""
    if distributed.is_single_process():
        return "hashes.json"
    # Copies on several hosts have one path and different times: in one file each would undo what the other remembers.
    return f"hashes_{socket.gethostname()}.json"


def _num_bytes(value: Value) -> int:
    return sum(array.nbytes for array in value.values())


def _to_bytes(value: Value) -> bytes:
    """A value as the content of an .npz file, each array as bytes under `name:dtype`, or `name:dtype:rows` if cut."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {}
    for name, trimmed in value.items():
        array = trimmed.array
        key = f"{name}:{array.dtype.name}"
        # Without rows to add, files are as they were before rows were cut.
        if trimmed.rows > len(array):
            key += f":{trimmed.rows}"
        # NumPy's own format does not know bfloat16.
        arrays[key] = array.view(np.uint8)
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _from_bytes(handle: Any) -> Value:
    """The inverse of `_to_bytes`."""
    value = {}
    with np.load(handle, allow_pickle=False) as data:
        for key in data.files:
            name, dtype, *rows = key.split(":")
            array = data[key].view(jnp.dtype(dtype))
            value[name] = Trimmed(array, int(rows[0])) if rows else trim(array)
    return value


def _write(file: epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all, also when several processes write it at once."""
    # Processes that write the same file must not share a partial one, and may be of several hosts.
    partial = file.parent / f".{file.name}.{secrets.token_hex(8)}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
