"""The shapes of a run's model without its weights: from the config files of a local directory, or a published name.

Nothing is downloaded, so that a gated model can be planned for before one has access to it.
"""

from __future__ import annotations

import dataclasses

import jax

from marble_jax.config import Settings
from marble_jax.families.base import Family, Networks
from marble_jax.families.descriptions import Size, TransformerShape
from marble_jax.programs.open_model import check_omitted, outline_networks, size_of
from marble_jax.trainable import lora
from marble_jax.types import Adapter


@dataclasses.dataclass(frozen=True)
class ModelShapes:
    """A run's model as shapes.

    Attributes:
      family: family of the model.
      networks: transformer and autoencoder, with shapes in place of weights.
      adapter: the adapter, as shapes.
      size: size of the images.
      latent: shape of one sample's latents.
      transformer: sizes of the transformer at one sample.
      encoder_parameters: numbers in the text encoders.
    """

    family: Family
    networks: Networks
    adapter: Adapter
    size: Size
    latent: tuple[int, ...]
    transformer: TransformerShape
    encoder_parameters: int


def model_shapes(settings: Settings) -> ModelShapes:
    """Returns the shapes of a run's model.

    Raises:
      InputError: neither a local directory with config files nor a published name; a size that does not fit.
    """
    model = settings.model
    scale = settings.lora.alpha / settings.lora.rank
    family, networks, place = outline_networks(model, scale)
    check_omitted(family, model.omit_text_encoders, "model.omit_text_encoders")
    spec = lora.lora_spec(settings.lora, family)

    def new_adapter() -> Adapter:
        # Traced for its shapes alone, so that any key does.
        return lora.init_adapter(jax.random.key(0), family.layers_at, networks.params, spec)

    size = size_of(model)
    return ModelShapes(
        family=family,
        networks=networks,
        adapter=jax.eval_shape(new_adapter),
        size=size,
        latent=networks.latent_shape(size),
        transformer=networks.transformer_shape(size, model.max_sequence_length),
        encoder_parameters=family.num_encoder_parameters(place, model.omit_text_encoders),
    )
