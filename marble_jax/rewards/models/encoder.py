"""A CLIP pair that rewards look through: images and prompts to unit vectors, each computed once.

Several rewards may share one pair. Text features are kept per prompt; image features per batch and preprocessing, so
that rewards which prepare images in the same way cost one forward pass together. (CLIPScore and the aesthetic
predictor share weights but not preprocessing, hence one copy of the weights and two passes.)
"""

from __future__ import annotations

import collections
import contextlib
import functools
import html
import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.families.sd3.text import load_tokenizer
from marble_jax.networks import openclip
from marble_jax.networks.clip import CLIPConfig, CLIPModel, abstract_params, load_clip
from marble_jax.rewards.models.preprocess import Preprocess, prepare
from marble_jax.types import Params
from marble_jax.weights.key_map import load_params, path_entries
from marble_jax.weights.torch_pickle import TorchPickleFile

TEXT_BATCH = 32
"""Prompts per call of the text tower; shorter batches are filled up so that it is compiled once."""
CACHED_PROMPTS = 65536
"""Text features kept, oldest dropped first (256 MB at width 1024)."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
HPS_FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")
"""HPSv2.1's weights in OpenCLIP's layout: complete, the base model's file is not needed beside them."""

Tokenize = Callable[[Sequence[str]], np.ndarray]


def exact(dtype: Any) -> contextlib.AbstractContextManager:
    """Full float32 products while a float32 network is traced; accelerators would round their factors otherwise."""
    return (
        jax.default_matmul_precision("highest")
        if jnp.dtype(dtype) == jnp.float32
        else contextlib.nullcontext()
    )


class ClipEncoder:
    """A CLIP pair with its tokenizer and preprocessing; safe to use from several threads.

    Attributes:
      model: both towers.
      params: their weights.
      preprocessor_config: contents of preprocessor_config.json, empty without one.
    """

    def __init__(
        self,
        model: CLIPModel,
        params: Params,
        tokenize: Tokenize,
        preprocessor_config: Mapping[str, Any] | None = None,
    ):
        """Wraps towers that are already loaded.

        Args:
          model: both towers.
          params: their weights.
          tokenize: prompts to int32 [N, T], padded and truncated to one length T.
          preprocessor_config: parsed preprocessor_config.json.
        """
        self.model, self.params, self.tokenize = model, params, tokenize
        self.preprocessor_config = dict(preprocessor_config or {})
        self._text = jax.jit(self._text_features)
        self._pixels = jax.jit(self.image_features)
        self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._last: dict[Preprocess, tuple[weakref.ref, Params, jax.Array]] = {}
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        directory: Path | str,
        dtype: Any = jnp.float32,
        tokenizer: Path | str | None = None,
        weights: Sequence[str] = (),
    ) -> ClipEncoder:
        """Loads a published directory: weights, tokenizer, preprocessor_config.json if there.

        Args:
          directory: of a Hugging Face `CLIPModel` (config.json with model.safetensors or pytorch_model.bin), or in
            OpenCLIP's layout (open_clip_pytorch_model.bin or its safetensors, perhaps open_clip_config.json).
          dtype: of weights and computation.
          tokenizer: directory of the tokenizer and preprocessor_config.json, where `directory` has none.
          weights: names of OpenCLIP-layout files that win over any others.

        Raises:
          InputError: the directory, or a file in it, is missing or malformed.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(
                f"{directory}: expected a directory of a CLIP model; received no such directory"
            )
        model, params, is_openclip = _load(directory, jnp.dtype(dtype), weights)
        beside = directory if tokenizer is None or has_tokenizer(directory) else tokenizer
        length = model.config.text.max_position_embeddings
        tokenize = load_tokenize(Path(beside), length, clean=openclip_text if is_openclip else None)
        config = _read_json(directory / "preprocessor_config.json") or _read_json(
            Path(beside) / "preprocessor_config.json"
        )
        return cls(model, params, tokenize, config)

    def preprocess(self, **overrides) -> Preprocess:
        """The image preprocessing of this model, with fields replaced by `overrides`."""
        return Preprocess.from_config(
            self.preprocessor_config, self.model.config.vision.image_size, **overrides
        )

    def image_features(self, params: Params, pixels: jax.Array) -> jax.Array:
        """Unit vectors float32 [N, D] of preprocessed pixels; traceable."""
        with exact(self.model.dtype):
            return self.model.apply({"params": params}, pixels, method=CLIPModel.image_features)

    def pixel_features(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [N, D] of pixels that were preprocessed on the host."""
        return np.asarray(self._pixels(self.params, pixels))

    def embed_images(self, params: Params, images: jax.Array, preprocess: Preprocess) -> jax.Array:
        """Unit vectors float32 [N, D] of images [N, H, W, 3] in [0, 1].

        Asked again for the same array (arrays on the device do not change), weights and preprocessing, it answers from
        the first time; that is how rewards on one tower share its work. Only the last batch's features are kept.
        """
        if not isinstance(images, jax.Array) or isinstance(images, jax.core.Tracer):
            return self._pixels(params, prepare(images, preprocess))
        with self._lock:
            kept = self._last.get(preprocess)
            if kept is None or kept[0]() is not images or kept[1] is not params:
                kept = (
                    weakref.ref(images),
                    params,
                    self._pixels(params, prepare(images, preprocess)),
                )
                self._last[preprocess] = kept
            return kept[2]

    def text_features(self, params: Params, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, D] of the prompts; only those not seen before go through the tower.

        The vectors are kept per text: `params` must be the same weights on every call.
        """
        with self._lock:
            new = [p for p in dict.fromkeys(prompts) if p not in self._kept]
            for start in range(0, len(new), TEXT_BATCH):
                part = new[start : start + TEXT_BATCH]
                ids = self.tokenize(part + [part[0]] * (TEXT_BATCH - len(part)))
                features = np.asarray(self._text(params, jnp.asarray(ids, jnp.int32)))
                self._kept.update(zip(part, features))
            rows = np.stack([self._kept[p] for p in prompts])
            while len(self._kept) > CACHED_PROMPTS:
                self._kept.popitem(last=False)
            return rows

    def _text_features(self, params: Params, ids: jax.Array) -> jax.Array:
        with exact(self.model.dtype):
            return self.model.apply({"params": params}, ids, method=CLIPModel.text_features)


def _load(directory: Path, dtype: Any, weights: Sequence[str]) -> tuple[CLIPModel, Params, bool]:
    """Towers, their weights, and whether the file was in OpenCLIP's layout."""
    preferred = openclip.find_weights(directory, weights)
    has_config = (directory / "config.json").is_file()
    if not preferred and has_config and any(directory.glob("model*.safetensors*")):
        return *load_clip(directory, dtype), False
    found = preferred or openclip.find_weights(directory)
    if found:
        settings = _read_json(directory / openclip.CONFIG).get("model_cfg")
        return *openclip.load_openclip(found, settings, dtype), True
    if has_config and (directory / "pytorch_model.bin").is_file():
        model = CLIPModel(CLIPConfig.from_dict(_read_json(directory / "config.json")), dtype)
        shapes = abstract_params(model)
        source = TorchPickleFile(directory / "pytorch_model.bin")
        return (
            model,
            load_params(source, path_entries(shapes), shapes, dtype, ("*.position_ids",)),
            False,
        )
    expected = ", ".join((*weights, "model.safetensors", *openclip.FILES, "pytorch_model.bin"))
    held = ", ".join(sorted(p.name for p in directory.iterdir())) or "an empty directory"
    raise InputError(
        f"{directory}: expected weights of a CLIP model, one of {expected}; received {held}"
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def load_tokenize(
    directory: Path,
    length: int,
    kind: str = "CLIPTokenizer",
    clean: Callable[[str], str] | None = None,
    special: Sequence[str] = (),
) -> Tokenize:
    """The tokenizer of a Hugging Face directory as a function, padding and truncating to `length` tokens.

    Args:
      directory: holds tokenizer.json, vocab.json or vocab.txt.
      length: tokens of every prompt.
      kind: class of the tokenizer where tokenizer_config.json does not name it.
      clean: applied to each prompt first.
      special: words added to the vocabulary, in this order.

    Raises:
      InputError: missing or unreadable tokenizer.
    """
    kind = _read_json(directory / "tokenizer_config.json").get("tokenizer_class", kind)
    tokenizer = load_tokenizer(directory, kind)
    if special:
        tokenizer.add_tokens(list(special), special_tokens=True)

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        texts = [clean(p) for p in prompts] if clean else list(prompts)
        return np.asarray(
            tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids
        )

    return tokenize


@functools.lru_cache(maxsize=4096)
def openclip_text(prompt: str) -> str:
    """A prompt as OpenCLIP's tokenizer reads it: broken characters mended, HTML entities and spaces resolved.

    Plain ASCII needs no mending; for the rest the package ftfy does it.

    Source: `basic_clean` and `whitespace_clean` of `open_clip/tokenizer.py`.
    """
    if not (prompt.isascii() and prompt.isprintable()):
        try:
            import ftfy  # optional
        except ImportError as error:
            raise InputError(
                f"OpenCLIP tokenizer: expected the package ftfy for prompts beyond ASCII such as "
                f"{prompt[:40]!r}; received none (pip install ftfy)"
            ) from error
        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def _read_json(path: Path) -> dict[str, Any]:
    """The parsed file; empty where it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: expected JSON; received an error at {error}") from error
