"""ImageReward: how much people would like an image for its prompt, by a BLIP that reads both together.

Text and image meet inside the network, so nothing is kept per prompt; a batch of N pairs costs N passes (upstream's
wrapper costs N squared and keeps the diagonal).

Source: Xu et al. 2023 (arXiv 2304.05977), `ImageReward/ImageReward.py` of THUDM/ImageReward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.errors import InputError
from marble_jax.networks.blip import BlipEncoder, BlipTextConfig, load_blip
from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.models import published
from marble_jax.rewards.models.aesthetic import affine, fold_head
from marble_jax.rewards.models.encoder import exact
from marble_jax.rewards.models.preprocess import Preprocess, prepare
from marble_jax.rewards.models.shared_encoders import find_tokenizer
from marble_jax.rewards.models.tokenizer import Tokenize, has_tokenizer, load_tokenize
from marble_jax.rewards.registration import (
    DTYPES,
    BuildContext,
    option,
    register_reward,
    required,
)
from marble_jax.storage.files import read_json
from marble_jax.types import Params
from marble_jax.weights.torch_pickle import open_weights

FILES = ("ImageReward.safetensors", "ImageReward.pt")
CONFIG = "med_config.json"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data; the score is standardised with them."""
SPECIAL = ("[DEC]", "[ENC]")
"""Words BLIP adds to BERT's vocabulary."""


class ImageReward(Reward):
    """The published score, about -2.3 to 2. A device reward."""

    def __init__(
        self, name: str, model: BlipEncoder, params: Params, head: Params, tokenize: Tokenize
    ):
        """Builds the reward.

        Args:
          name: key of the reward.
          model: BLIP's image-grounded text encoder.
          params: its weights.
          head: from `aesthetic.fold_head`.
          tokenize: prompts to int32 [N, T].

        Raises:
          InputError: a head for states of another width.
        """
        if head["weight"].shape != (model.text.hidden_size,):
            raise InputError(
                f"reward {name}: expected a head for text states of width {model.text.hidden_size}; "
                f"received one for width {head['weight'].shape[0]}"
            )
        super().__init__(name=name, kind="device", params={"blip": params, "head": head})
        self.model, self.tokenize = model, tokenize
        # Not from a preprocessor_config.json, which the published folder does not have.
        self.preprocess = Preprocess(model.vision.image_size, crop="round")
        self._score = jax.jit(self._standardised)

    @classmethod
    def load(
        cls,
        name: str,
        directory: Path | str,
        tokenizer: Path | str | None = None,
        dtype: Any = jnp.float32,
    ) -> ImageReward:
        """Returns the reward over a published directory.

        Args:
          name: key of the reward.
          directory: holds ImageReward.pt (or .safetensors) and med_config.json.
          tokenizer: directory of BERT's tokenizer, where `directory` has none.
          dtype: of weights and computation.

        Raises:
          InputError: missing or malformed directory, config, weights or tokenizer.
        """
        directory = Path(directory)
        file = _weights_file(directory)
        source = open_weights(file)
        config = BlipTextConfig.from_dict(read_json(directory / CONFIG))
        model, params = load_blip(source, config, jnp.dtype(dtype))
        beside = directory
        if tokenizer is not None and not has_tokenizer(directory):
            beside = Path(tokenizer)
        # The order of the added words is that of their rows in the embedding.
        tokenize = load_tokenize(
            beside,
            MAX_TOKENS,
            "BertTokenizer",
            special=SPECIAL,
            vocab_size=config.vocab_size,
        )
        return cls(name, model, params, fold_head(source, "mlp."), tokenize)

    def _standardised(self, params: Params, pixels: jax.Array, ids: jax.Array) -> jax.Array:
        with exact(self.model.dtype):
            features: Any = self.model.apply({"params": params["blip"]}, pixels, ids)
        return (affine(params["head"], features) - MEAN) / STD

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[jax.Array, jax.Array]:
        """See `Reward.score`."""
        # Prompts are tokenized anew each time: with the image in the network there is nothing to keep for a text.
        ids = jnp.asarray(self.tokenize(prompts), jnp.int32)
        values = self._score(params, prepare(images, self.preprocess), ids)
        return values, jnp.ones(values.shape, bool)


def _weights_file(directory: Path) -> Path:
    for name in FILES:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory}: expected {' or '.join(FILES)}; received no such file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRewardOptions:
    """Options of the kind "imagereward"."""

    model: str = required("folder or Hub name of ImageReward")
    tokenizer: str = option("", "folder or Hub name of BERT's tokenizer, where the model has none")
    dtype: str = option("", "of the network; the run's by default", choices=DTYPES)


@register_reward("imagereward", ImageRewardOptions)
def build_imagereward(name: str, options: ImageRewardOptions, context: BuildContext) -> ImageReward:
    """Builds ImageReward from its published folder."""
    folder = published.find_folder(name, context.directory, options.model, "imagereward")
    tokenizer = find_tokenizer(name, context.directory, folder, options.tokenizer)
    return ImageReward.load(name, folder, tokenizer, options.dtype or context.dtype)
