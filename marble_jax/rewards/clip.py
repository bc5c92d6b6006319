"""Rewards that compare a picture with its prompt in CLIP space: PickScore, HPSv2.1, CLIPScore and any of their size.

They are one computation, a factor times the cosine of two embeddings, with different weights, factors and
preprocessing; `FORMULAS` lists the differences. The image tower runs on the device with every batch, the text tower
once per new prompt: its unit vectors are kept.
"""
from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError, one_of
from marble_jax.models.clip import CLIPModel, load_clip
from marble_jax.models.pipeline import load_tokenizer
from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.preprocess import Preprocess
from marble_jax.types import Params

TEXT_BATCH = 32
"""Prompts per call of the text tower; shorter batches are filled up so that it is compiled once."""
CACHED_PROMPTS = 65536
"""Text features kept, oldest dropped first (256 MB at width 1024)."""

Tokenize = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Formula:
    """How a published score is made from the cosine of picture and prompt.

    Attributes:
      logit_scale: whether the cosine is multiplied by the model's exp(logit_scale).
      divisor: by what the result is divided.
      preprocess: fields of `Preprocess` in which the scorer departs from its model's preprocessor_config.json.
    """

    logit_scale: bool
    divisor: float
    preprocess: Mapping[str, Any]

    def factor(self, scale: jax.Array) -> jax.Array:
        """What the cosine is multiplied by, for a model with exp(logit_scale) = `scale`."""
        return (scale if self.logit_scale else 1.0) / self.divisor


FORMULAS = {
    "pickscore": Formula(True, 26.0, {"eight_bit": True, "method": "bicubic"}),
    "hpsv2": Formula(False, 1.0, {"eight_bit": False, "method": "bicubic", "fit": "longest"}),
    "clipscore": Formula(True, 100.0, {"eight_bit": False, "method": "bilinear"}),
}
"""Source: the scorers of NVlabs/DiffusionNFT. Theirs of CLIPScore rounds the normalised pixels to float16; ours not."""


class ClipEncoder:
    """A CLIP pair with its tokenizer and preprocessing; several rewards may share one, and its text features.

    Attributes:
      model: both towers.
      params: their weights.
      preprocessor_config: contents of preprocessor_config.json, empty without one.
    """

    def __init__(
        self, model: CLIPModel, params: Params, tokenize: Tokenize, preprocessor_config: Mapping[str, Any] | None = None
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
        self._text = jax.jit(lambda params, ids: model.apply({"params": params}, ids, method=CLIPModel.text_features))
        self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    @classmethod
    def load(cls, directory: Path | str, dtype: Any = jnp.float32) -> ClipEncoder:
        """Loads a Hugging Face `CLIPModel` directory: config, weights, tokenizer, preprocessor_config.json if there.

        Raises:
          InputError: the directory, or a file in it, is missing or malformed.
        """
        directory = Path(directory)
        model, params = load_clip(directory, dtype)
        tokenize = _tokenizer(directory, model.config.text.max_position_embeddings)
        return cls(model, params, tokenize, _read_json(directory / "preprocessor_config.json"))

    def preprocess(self, **overrides) -> Preprocess:
        """The picture preprocessing of this model, with fields replaced by `overrides`."""
        return Preprocess.from_config(self.preprocessor_config, self.model.config.vision.image_size, **overrides)

    def image_features(self, params: Params, pixels: jax.Array) -> jax.Array:
        """Unit vectors float32 [N, D] of preprocessed pixels; traceable."""
        return self.model.apply({"params": params}, pixels, method=CLIPModel.image_features)

    def text_features(self, params: Params, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, D] of the prompts; only those not seen before go through the tower.

        The vectors are kept per text: `params` must be the same weights on every call.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self._kept]
        for start in range(0, len(new), TEXT_BATCH):
            part = new[start:start + TEXT_BATCH]
            ids = self.tokenize(part + [part[0]] * (TEXT_BATCH - len(part)))
            features = np.asarray(self._text(params, jnp.asarray(ids, jnp.int32)))
            self._kept.update(zip(part, features))
        rows = np.stack([self._kept[p] for p in prompts])
        while len(self._kept) > CACHED_PROMPTS:
            self._kept.popitem(last=False)
        return rows


def _tokenizer(directory: Path, length: int) -> Tokenize:
    """The tokenizer of a Hugging Face directory, padding and truncating to `length` tokens."""
    kind = _read_json(directory / "tokenizer_config.json").get("tokenizer_class", "CLIPTokenizer")
    tokenizer = load_tokenizer(directory, kind)

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        return np.asarray(tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids)

    return tokenize


def _read_json(path: Path) -> dict[str, Any]:
    """The parsed file; empty where it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: expected JSON; received an error at {error}") from error


class CLIPReward(Reward):
    """Alignment of picture and prompt: `FORMULAS[formula]` on a CLIP pair. A device reward."""

    def __init__(self, name: str, encoder: ClipEncoder, formula: str = "clipscore"):
        """Builds the reward.

        Args:
          name: key of the reward.
          encoder: the CLIP pair, possibly shared with other rewards.
          formula: "pickscore", "hpsv2" or "clipscore".
        """
        one_of(f"reward {name}: formula", formula, FORMULAS)
        super().__init__(name=name, kind="device", params=encoder.params)
        self.encoder, self.formula = encoder, FORMULAS[formula]
        self.preprocess = encoder.preprocess(**self.formula.preprocess)
        self._score = jax.jit(self._cosine)

    @classmethod
    def load(cls, name: str, directory: Path | str, formula: str = "clipscore", dtype: Any = jnp.float32) -> CLIPReward:
        """The reward over a Hugging Face `CLIPModel` directory."""
        return cls(name, ClipEncoder.load(directory, dtype), formula)

    def _cosine(self, params: Params, images: jax.Array, texts: jax.Array) -> jax.Array:
        features = self.encoder.image_features(params, self.preprocess(images))
        scale = self.encoder.model.apply({"params": params}, method=CLIPModel.scale)
        return jnp.sum(features * texts, -1) * self.formula.factor(scale)

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`; about 0.7 to 0.95 for PickScore, 0.2 to 0.35 for HPSv2.1, 0.15 to 0.4 for CLIPScore."""
        values = self._score(params, images, self.encoder.text_features(params, prompts))
        return values, jnp.ones(values.shape, bool)
