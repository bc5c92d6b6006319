"""Opened models, kept so that policies and LoRAs of one base share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from marble_jax.console import Console
from marble_jax.distributed import device_mesh
from marble_jax.families.base import Family, Networks
from marble_jax.families.decoding import Decoder
from marble_jax.families.descriptions import NetworkOptions
from marble_jax.families.embedding_cache import EmbeddingCache
from marble_jax.programs.open_model import attention_of, stream_dtype_of
from marble_jax.types import DTYPES


class PipelineCache:
    """Opens models; keeps the last one, and the text embeddings of all."""

    def __init__(self) -> None:
        self._key: Any = None
        self._networks: Networks | None = None
        self._decoder: Decoder | None = None
        self._texts: dict[Any, EmbeddingCache] = {}
        self._said: set[str] = set()

    def networks(
        self,
        family: Family,
        root: Path,
        dtype: str,
        attention: str,
        mesh: Mesh,
        stream_dtype: str = "compute",
    ) -> tuple[Networks, Decoder]:
        """Returns the networks in `root`, whole on every device, with their decoder."""
        key = (root, dtype, attention, stream_dtype)
        if key == self._key and self._networks is not None and self._decoder is not None:
            return self._networks, self._decoder
        # Dropped before the next one is read: two models may not fit.
        self._networks = self._decoder = None
        replicated = NamedSharding(mesh, device_mesh.REPLICATED)

        def place(component: str, path: tuple[str, ...], leaf: Any) -> jax.Array:
            return device_mesh.read_sharded(replicated, leaf)

        options = NetworkOptions(
            dtype=DTYPES[dtype],
            stream_dtype=stream_dtype_of(stream_dtype),
            attention=attention_of(attention, dtype, mesh),
        )
        self._networks = family.open(root, options, place)
        self._decoder = Decoder(self._networks)
        self._key = key
        return self._networks, self._decoder

    def say_once(self, lines: Sequence[str], console: Console) -> None:
        """Says lines, but none again: models of one evaluation mostly share their text encoders."""
        for line in lines:
            if line not in self._said:
                console.say(line)
            self._said.add(line)

    def texts(
        self,
        family: Family,
        root: Path,
        max_sequence_length: int,
        dtype: str,
        omit: tuple[str, ...],
        folder: str,
    ) -> EmbeddingCache:
        """Returns the conditioning by the text encoders in `root`; those of other models leave memory."""
        key = (root, max_sequence_length, dtype, omit, folder)
        for cached_key, cache in self._texts.items():
            # The conditioning that is computed already stays at hand: it is small.
            if cached_key != key:
                cache.release()
        if key not in self._texts:
            self._texts[key] = EmbeddingCache(
                family, root, max_sequence_length, DTYPES[dtype], omit=omit, folder=folder
            )
        return self._texts[key]
