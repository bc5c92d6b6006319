"""A whole model opened through its family, for tests that want networks, text encoders and decoder at once."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from marble_jax.families.decoding import Decoder, as_samples
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.families.location import find_model
from marble_jax.families.registry import family_of


class LoadedPipeline:
    """Networks of a model with their text encoders; what the networks have is read through."""

    def __init__(self, directory, omit, text_encoders, place, options):
        root = find_model(Path(directory))
        self.family = family_of(root)
        self.text = None
        if text_encoders:

            def put(component):
                if place is None:
                    return None
                return lambda path, leaf: place(component, path, leaf)

            self.text = self.family.open_text_encoders(root, options.dtype, omit, put)
        self.networks = self.family.open(root, options, place)
        self._decoder = Decoder(self.networks)

    def __getattr__(self, name):
        return getattr(self.networks, name)

    def latent_shape(self, height, width):
        return self.networks.latent_shape(Size(height, width))

    def encode_prompts(self, prompts, max_sequence_length):
        return self.text.encode(prompts, max_sequence_length)

    def decode(self, latents, batch, place=lambda part: part):
        """Images [N, H, W, 3]."""
        return as_samples(self._decoder(jnp.asarray(latents), batch, place))


def load_pipeline(
    directory, *, omit=(), text_encoders=True, prompt_batch=None, place=None, **options
):
    """Opens a model whole; `options` are fields of `NetworkOptions`."""
    pipeline = LoadedPipeline(directory, omit, text_encoders, place, NetworkOptions(**options))
    if prompt_batch is not None:
        pipeline.text.prompt_batch = prompt_batch
    return pipeline
