"""A model family that shares nothing with the shipped ones: latents are sequences [L, C], conditioning is masked word
counts, noise levels follow a cosine. One folder's worth of code, registered by the test; the package is not edited."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from marble_jax.distributed.sharding import REPLICATED_AXES, ShardingRules
from marble_jax.errors import InputError
from marble_jax.families.base import Family, Networks, TextEncoders
from marble_jax.families.descriptions import (
    DiffusersNames,
    Layer,
    NetworkOptions,
    SampleFlops,
    Size,
    TransformerShape,
)
from marble_jax.networks.lora_dense import COLLECTION, LoraDense, check_adapter
from marble_jax.weights.formats import FileFormats, LayerPart, Layout, LoraNames

PATCH, WIDTH, WORDS = 8, 24, 7
RULES = ShardingRules(
    "toy",
    ((r".+/kernel", ("inputs", "outputs")), (r".+/bias", ("vector",))),
    REPLICATED_AXES,
)


class ToyTransformer(nn.Module):
    """Every patch for itself, with the mean of the masked words and the noise level."""

    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x, sigma, words, mask):
        count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        mean = jnp.sum(words * mask[..., None], axis=1) / count
        extra = jnp.concatenate([mean, sigma[:, None]], axis=1)
        extra = jnp.broadcast_to(extra[:, None], (*x.shape[:2], extra.shape[1]))
        y = jnp.concatenate([x, extra], axis=-1)
        y = nn.tanh(LoraDense(WIDTH, lora_scale=self.lora_scale, name="expand")(y))
        return LoraDense(x.shape[-1], lora_scale=self.lora_scale, name="reduce")(y)


class ToyTextEncoders(TextEncoders):
    prompt_batch = 4

    def encode(self, prompts, max_sequence_length):
        words = np.zeros((len(prompts), max_sequence_length, WORDS), np.float32)
        mask = np.zeros((len(prompts), max_sequence_length), bool)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(prompt.split()[:max_sequence_length]):
                words[row, column, zlib.crc32(word.encode()) % WORDS] = 1
                mask[row, column] = True
        return {"words": jnp.asarray(words), "mask": jnp.asarray(mask)}


class ToyNetworks(Networks):
    sharding_rules = RULES
    largest_activation = 3

    def __init__(self, directory, options, params, decoder_params):
        self.directory, self.options = directory, options
        self.params, self.decoder_params = params, decoder_params

    def velocity(self, params, adapter, xt, sigma, cond):
        variables = {"params": params}
        if adapter is not None:
            check_adapter(params, adapter)
            variables[COLLECTION] = adapter
        model = ToyTransformer(self.options.lora_scale)
        sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), xt.shape[:1])
        return model.apply(variables, xt, sigma, cond["words"], cond["mask"])

    def decode_latents(self, decoder_params, latents):
        patches = jax.nn.sigmoid(latents @ decoder_params["kernel"])
        side = round(latents.shape[1] ** 0.5)
        images = patches.reshape(len(latents), side, side, PATCH, PATCH, 3)
        images = images.transpose(0, 1, 3, 2, 4, 5)
        return images.reshape(len(latents), 1, side * PATCH, side * PATCH, 3)

    def check_size(self, size, names):
        for name, pixels in zip(names, (size.height, size.width)):
            if pixels % PATCH or size.height != size.width:
                raise InputError(
                    f"{name}: expected a square of multiples of {PATCH}; received {size}"
                )

    def latent_shape(self, size):
        self.check_size(size, ("height", "width", "frames"))
        return (size.height // PATCH) * (size.width // PATCH), 5

    @property
    def default_size(self):
        return Size(32, 32)

    def levels(self, num_steps, latent_shape):
        angles = np.linspace(0, np.pi / 2, num_steps + 1)
        return np.cos(angles).clip(0, 1).astype(np.float32) * np.float32(0.98)

    def conditioning_shapes(self, count, max_sequence_length):
        shape = (count, max_sequence_length)
        return {
            "words": jax.ShapeDtypeStruct((*shape, WORDS), jnp.float32),
            "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }

    def transformer_shape(self, size, max_sequence_length):
        tokens = self.latent_shape(size)[0]
        return TransformerShape(tokens, 0, WIDTH, 1, 1, 0, max_sequence_length * (WORDS + 1))

    def sample_flops(self, adapter, size, max_sequence_length):
        tokens = self.latent_shape(size)[0]
        base = 2.0 * tokens * sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return SampleFlops(base, base, 2 * base, base, 0.0)

    def decoder_flops(self, size):
        return 2.0 * self.latent_shape(size)[0] * self.decoder_params["kernel"].size

    def with_options(self, options):
        return ToyNetworks(self.directory, options, self.params, self.decoder_params)


def layers_at(path, shape):
    return [Layer(f"mixer.{path[0]}", path, None)]


def layer_parts(shapes):
    names = [f"mixer.{path[0]}" for path in traverse_util.flatten_dict(dict(shapes))]
    return {name: (LayerPart(name),) for name in names}


FORMATS = FileFormats(
    name="Toy",
    article="a",
    pipeline="ToyPipeline",
    diffusers_version="0",
    components=("transformer", "decoder"),
    carried=("text_encoder",),
    stems={"transformer": "weights", "decoder": "weights"},
    classes={},
    adapted="transformer",
    layout=lambda component, config, keys: Layout((), {}),
    lora=LoraNames(
        prefixes=("transformer.",),
        layers_at=layers_at,
        layer_parts=layer_parts,
        diffusers_prefix="transformer.",
        base_model={"base_model_class": "Toy", "parent_library": "toy"},
        other_models={"SD3": re.compile("transformer_blocks")},
    ),
)


class ToyFamily(Family):
    name = "toy"
    pipeline_class = "ToyPipeline"
    network_components = ("transformer", "decoder")
    optional_text_encoders = ()
    default_targets = ("expand", "reduce")
    published_models = ()
    tensor_parallel_modules = "expand"
    gathered_tables = "none"
    formats = FORMATS
    diffusers = DiffusersNames(
        "ToyPipeline", "ToyTransformer", "toy", (), lambda latents: latents, {}
    )

    def components(self, omit=()):
        return ("transformer", "decoder", "text_encoder")

    def open(self, root, options, place=None, decoder_dtype=jnp.float32):
        params = traverse_util.unflatten_dict(_read(root / "transformer", place, "transformer"))
        decoder = traverse_util.unflatten_dict(_read(root / "decoder", place, "decoder"))
        return ToyNetworks(root, options, params, decoder["decoder"])

    def outline(self, model, options):
        opened = self.open(model, options)
        params, decoder = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            (opened.params, opened.decoder_params),
        )
        return ToyNetworks(model, options, params, decoder)

    def num_encoder_parameters(self, model, omit=()):
        return 0

    def default_sequence_length(self, root):
        return 6

    def component_rules(self, component, head_width):
        return RULES

    def open_text_encoders(self, root, dtype, omit=(), place=lambda component: None):
        return ToyTextEncoders()

    def text_components(self, root, omit=()):
        return ("text_encoder",)

    def prompt_limits(self, root, max_sequence_length, omit=()):
        return ()

    def layers_at(self, path, shape):
        return layers_at(path, shape)


def _read(folder, place, component):
    leaves = {}
    for name, leaf in load_file(folder / "weights.safetensors").items():
        path = tuple(name.split("/"))
        leaves[path] = jnp.asarray(leaf) if place is None else place(component, path, leaf)
    return leaves


def new_params(seed):
    model = ToyTransformer()
    inputs = (jnp.zeros((1, 16, 5)), jnp.zeros(1), jnp.zeros((1, 6, WORDS)), jnp.ones((1, 6)))
    return model.init(jax.random.key(seed), *inputs)["params"]


def write_model(root: Path) -> Path:
    """A model of the toy family on disk."""
    params = traverse_util.flatten_dict(new_params(3))
    decoder = np.random.default_rng(4).normal(size=(5, PATCH * PATCH * 3)).astype(np.float32)
    tensors = {
        "transformer": {"/".join(path): np.asarray(leaf) for path, leaf in params.items()},
        "decoder": {"decoder/kernel": decoder},
        "text_encoder": {},
    }
    for component, content in tensors.items():
        (root / component).mkdir(parents=True)
        (root / component / "config.json").write_text("{}")
        if content:
            save_file(content, root / component / "weights.safetensors")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    return root


FAMILY = ToyFamily()
OPTIONS = NetworkOptions()
