"""A CLIP pair that rewards look through: images and prompts to unit vectors, each computed once.

Several rewards may share one pair. Text features are kept per prompt; image features per batch and preprocessing, so
that rewards which prepare images in the same way cost one forward pass together. (CLIPScore and the aesthetic
predictor share weights but not preprocessing, hence one copy of the weights and two passes.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.networks import openclip
from marble_jax.networks.clip import CLIPConfig, CLIPModel, abstract_params, load_clip
from marble_jax.rewards.models.preprocess import Preprocess, prepare
from marble_jax.rewards.models.tokenizer import (
    Tokenize,
    has_tokenizer,
    image_settings,
    load_tokenize,
    openclip_text,
    read_config,
)
from marble_jax.types import Params
from marble_jax.weights.key_map import load_params, path_entries
from marble_jax.weights.torch_pickle import TorchPickleFile

TEXT_BATCH = 32
"""Prompts per call of the text tower; shorter batches are filled up so that it is compiled once."""
CACHED_PROMPTS = 65536
"""Text features kept, oldest dropped first (256 MB at width 1024)."""
HPS_FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")
"""HPSv2.1's weights in OpenCLIP's layout: complete, the base model's file is not needed beside them."""


def exact(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """Full float32 products while a float32 network is traced; accelerators would round their factors otherwise."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class _ImageFeatures:
    """Features of the last batch, and what they were computed from.

    Attributes:
      images: the batch, referred to weakly so that the features do not keep its pixels alive.
      params: the tower's weights.
      features: float32 [N, D].
    """

    images: weakref.ref
    params: Params
    features: jax.Array


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
        self._compiled_text_features = jax.jit(self._text_features)
        self._compiled_image_features = jax.jit(self.image_features)
        self._by_prompt: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._last_images: dict[Preprocess, _ImageFeatures] = {}
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
        model, params, is_openclip = _load_towers(directory, jnp.dtype(dtype), weights)
        beside = directory
        if tokenizer is not None and not has_tokenizer(directory):
            beside = Path(tokenizer)
        # OpenCLIP's own tokenizer mends prompts first; the files it is published with do not say so.
        clean = None
        if is_openclip:
            clean = openclip_text
        text = model.config.text
        tokenize = load_tokenize(
            beside,
            text.max_position_embeddings,
            clean=clean,
            vocab_size=text.vocab_size,
            end_id=text.eos_token_id,
        )
        config = image_settings(directory) or image_settings(beside)
        return cls(model, params, tokenize, config)

    def preprocess(self, **overrides: Any) -> Preprocess:
        """Returns the image preprocessing of this model, with fields replaced by `overrides`."""
        side = self.model.config.vision.image_size
        return Preprocess.from_config(self.preprocessor_config, side, **overrides)

    def logit_scale(self, params: Params) -> jax.Array:
        """Returns exp(logit_scale), the factor from cosine to logit; traceable."""
        return _single(self.model.apply({"params": params}, method=CLIPModel.scale))

    def image_features(self, params: Params, pixels: jax.Array) -> jax.Array:
        """Returns unit vectors float32 [N, D] of preprocessed pixels; traceable."""
        with exact(self.model.dtype):
            variables = {"params": params}
            return _single(self.model.apply(variables, pixels, method=CLIPModel.image_features))

    def pixel_features(self, pixels: np.ndarray) -> np.ndarray:
        """Returns unit vectors float32 [N, D] of pixels that were preprocessed on the host."""
        return np.asarray(self._compiled_image_features(self.params, pixels))

    def embed_images(self, params: Params, images: jax.Array, preprocess: Preprocess) -> jax.Array:
        """Returns unit vectors float32 [N, D] of images [N, H, W, 3] in [0, 1].

        Asked again for the same array (arrays on the device do not change), weights and preprocessing, it answers from
        the first time; that is how rewards on one tower share its work. Only the last batch's features are kept.
        """
        # A NumPy array may have changed since, and a tracer has no identity that means anything.
        if not isinstance(images, jax.Array) or isinstance(images, jax.core.Tracer):
            return self._compiled_image_features(params, prepare(images, preprocess))
        with self._lock:
            last = self._last_images.get(preprocess)
            if last is not None and last.images() is images and last.params is params:
                return last.features
            features = self._compiled_image_features(params, prepare(images, preprocess))
            self._last_images[preprocess] = _ImageFeatures(weakref.ref(images), params, features)
            return features

    def text_features(self, params: Params, prompts: Sequence[str]) -> np.ndarray:
        """Returns unit vectors float32 [N, D] of the prompts; only those not seen before go through the tower.

        The vectors are kept per text: `params` must be the same weights on every call.
        """
        with self._lock:
            self._embed_new(params, prompts)
            features = np.stack([self._by_prompt[prompt] for prompt in prompts])
            # After the batch was read: a batch larger than the cache would otherwise lose its own first prompts.
            while len(self._by_prompt) > CACHED_PROMPTS:
                self._by_prompt.popitem(last=False)
            return features

    def _embed_new(self, params: Params, prompts: Sequence[str]) -> None:
        """Puts the features of prompts not seen before into the cache."""
        new = []
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._by_prompt:
                new.append(prompt)
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            # Filled up with a prompt of its own, so that the tower is compiled for one size.
            padding = [batch[0]] * (TEXT_BATCH - len(batch))
            ids = jnp.asarray(self.tokenize(batch + padding), jnp.int32)
            features = np.asarray(self._compiled_text_features(params, ids))
            # `zip` leaves the padding's features behind.
            self._by_prompt.update(zip(batch, features))

    def _text_features(self, params: Params, ids: jax.Array) -> jax.Array:
        with exact(self.model.dtype):
            return _single(
                self.model.apply({"params": params}, ids, method=CLIPModel.text_features)
            )


def _single(output: Any) -> jax.Array:
    """Returns the output of a module; flax's type allows a pair with mutated variables, of which there are none."""
    return output


def _load_towers(
    directory: Path, dtype: Any, weights: Sequence[str]
) -> tuple[CLIPModel, Params, bool]:
    """Returns towers, their weights, and whether the file was in OpenCLIP's layout."""
    preferred = openclip.find_weights(directory, weights)
    has_config = (directory / "config.json").is_file()
    has_safetensors = any(directory.glob("model*.safetensors*"))
    if preferred is None and has_config and has_safetensors:
        model, params = load_clip(directory, dtype)
        return model, params, False
    file = preferred or openclip.find_weights(directory)
    if file is not None:
        settings = read_config(directory / openclip.CONFIG).get("model_cfg")
        model, params = openclip.load_openclip(file, settings, dtype)
        return model, params, True
    pickle = directory / "pytorch_model.bin"
    if has_config and pickle.is_file():
        return *_load_pickle(directory, pickle, dtype), False
    expected = ", ".join((*weights, "model.safetensors", *openclip.FILES, "pytorch_model.bin"))
    held = ", ".join(sorted(path.name for path in directory.iterdir())) or "an empty directory"
    raise InputError(
        f"{directory}: expected weights of a CLIP model, one of {expected}; received {held}"
    )


def _load_pickle(directory: Path, pickle: Path, dtype: Any) -> tuple[CLIPModel, Params]:
    """Returns towers and weights of transformers' layout from before safetensors."""
    model = CLIPModel(CLIPConfig.from_dict(read_config(directory / "config.json")), dtype)
    shapes = abstract_params(model)
    # Older files hold the position numbers 0, 1, 2, ... as if they were weights.
    ignored = ("*.position_ids",)
    params = load_params(TorchPickleFile(pickle), path_entries(shapes), shapes, dtype, ignored)
    return model, params
