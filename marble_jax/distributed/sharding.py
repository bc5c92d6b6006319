"""Which axis of which weight is split over which axis of the mesh, for every network, in one place.

Every parameter has a tuple of logical axis names by rule on its path, and a table says over which axis of the mesh a
name is split. Products that widen a layer are split along their outputs and those that narrow it along their inputs
(over `tensor`, as in Megatron), so that one sum over devices a layer is enough; the model's width is split over `fsdp`
and gathered layer by layer where it is used. A parameter that no rule names is an error, not replicated in silence.

Source: Shoeybi et al. 2019 (arXiv 1909.08053) for `tensor`; Rajbhandari et al. 2020 (arXiv 1910.02054, stage 3) for
`fsdp`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError

Path = tuple[str, ...]

TABLE: tuple[tuple[str, str | None], ...] = (
    ("embed", "fsdp"),  # the model's width
    ("heads", "tensor"),  # heads x their width, never split within a head
    ("mlp", "tensor"),  # hidden units
    ("vocab", "tensor"),
    ("condition", "tensor"),  # the conditioning vector where modulation is made of it
    ("modulation", "fsdp"),  # shifts, scales and gates
    ("layers", None),  # of a scanned run: every device walks through all of them
    ("vector", None),  # biases and scales of the model's width
    ("features", None),  # of what comes into a network and goes out of it
    ("positions", None),
    ("stack", None),  # an axis of length 1
    ("height", None),  # of a convolution's window
    ("width", None),
    ("inputs", None),  # channels
    ("outputs", None),
    ("qkv", None),  # three projections in one matrix
    ("rank", None),  # of an adapter
)
"""Logical axis -> axis of the mesh, for weights that are large."""
WHOLE = tuple((name, None) for name, _ in TABLE)
"""The same where every device holds everything."""
TABLES = {
    "transformer": TABLE,
    "text_encoder": TABLE,
    "text_encoder_2": TABLE,
    "text_encoder_3": TABLE,
    "vae": WHOLE,
    "reward": WHOLE,
    "adapter": WHOLE,
}
"""By network. Autoencoder and reward networks are small beside their activations; gathering them would cost more than
it saves. Adapters, and with them the optimiser's moments, are small, and every device updates them alike."""

_ATTENTION, _DENSE = r"blocks?_\d+/attn2?/", r"(kernel|bias)"
_CLIP, _BLIP = (
    r"(text|vision)_model/encoder\.layers\.\d+/",
    r"blip\.text_encoder/encoder\.layer\.\d+/",
)
_VISION, _T5 = r"blip\.visual_encoder/", r"encoder\.block\.\d+/layer\."

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # MMDiT
    (_ATTENTION + r"(to_[qkv]|add_[qkv]_proj)/kernel", ("embed", "heads")),
    (_ATTENTION + r"(to_[qkv]|add_[qkv]_proj)/bias", ("heads",)),
    (_ATTENTION + r"(to_out_0|to_add_out)/kernel", ("heads", "embed")),
    (_ATTENTION + r"(to_out_0|to_add_out)/bias", ("vector",)),
    (_ATTENTION + r"norm_(added_)?[qk]/scale", ("vector",)),
    (r"blocks?_\d+/ff(_context)?/net_0_proj/kernel", ("embed", "mlp")),
    (r"blocks?_\d+/ff(_context)?/net_0_proj/bias", ("mlp",)),
    (r"blocks?_\d+/ff(_context)?/net_2/kernel", ("mlp", "embed")),
    (r"blocks?_\d+/ff(_context)?/net_2/bias", ("vector",)),
    (r"(blocks?_\d+/norm1(_context)?|norm_out)/linear/kernel", ("condition", "modulation")),
    (r"(blocks?_\d+/norm1(_context)?|norm_out)/linear/bias", ("vector",)),
    (r"time_text_embed/(text|timestep)_embedder/linear_1/kernel", ("features", "mlp")),
    (r"time_text_embed/(text|timestep)_embedder/linear_1/bias", ("mlp",)),
    (r"time_text_embed/(text|timestep)_embedder/linear_2/kernel", ("mlp", "embed")),
    (r"time_text_embed/(text|timestep)_embedder/linear_2/bias", ("vector",)),
    (r"context_embedder/kernel", ("features", "embed")),
    (r"pos_embed/pos_embed", ("stack", "positions", "embed")),
    (r"pos_embed/proj/kernel", ("height", "width", "inputs", "vector")),
    (r"proj_out/kernel", ("embed", "features")),
    (r"(context_embedder|pos_embed/proj|proj_out)/bias", ("vector",)),
    # Autoencoder
    (
        r"((en|de)coder|quant_conv|post_quant_conv)/(.+/)?(?!to_)\w[^/]*/kernel|(post_)?quant_conv/kernel",
        ("height", "width", "inputs", "outputs"),
    ),
    (r"(en|de)coder/mid_block\.attentions\.0/to_(q|k|v|out\.0)/kernel", ("inputs", "outputs")),
    (r"(en|de)coder/.+/(bias|scale)|(post_)?quant_conv/bias", ("vector",)),
    # CLIP, and OpenCLIP under the same names
    (_CLIP + r"self_attn\.[qkv]_proj/kernel", ("embed", "heads")),
    (_CLIP + r"self_attn\.[qkv]_proj/bias", ("heads",)),
    (_CLIP + r"self_attn\.out_proj/kernel", ("heads", "embed")),
    (_CLIP + r"mlp\.fc1/kernel", ("embed", "mlp")),
    (_CLIP + r"mlp\.fc1/bias", ("mlp",)),
    (_CLIP + r"mlp\.fc2/kernel", ("mlp", "embed")),
    (_CLIP + r"((self_attn\.out_proj|mlp\.fc2)/bias|layer_norm\d/(bias|scale))", ("vector",)),
    (r"text_model/embeddings\.token_embedding/embedding", ("vocab", "embed")),
    (r"(text|vision)_model/embeddings\.position_embedding/embedding", ("positions", "embed")),
    (r"vision_model/embeddings\.class_embedding", ("vector",)),
    (r"vision_model/embeddings\.patch_embedding/kernel", ("height", "width", "inputs", "vector")),
    (
        r"(text_model/final_layer_norm|vision_model/(pre_layrnorm|post_layernorm))/(bias|scale)",
        ("vector",),
    ),
    (r"(text|visual)_projection/kernel", ("embed", "features")),
    (r"logit_scale", ()),
    # T5
    (_T5 + r"0\.SelfAttention\.[qkv]/kernel", ("embed", "heads")),
    (_T5 + r"0\.SelfAttention\.o/kernel", ("heads", "embed")),
    (_T5 + r"1\.DenseReluDense\.wi(_\d)?/kernel", ("embed", "mlp")),
    (_T5 + r"1\.DenseReluDense\.wo/kernel", ("mlp", "embed")),
    (
        r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias/embedding",
        ("positions", "features"),
    ),
    (_T5 + r"\d\.layer_norm/scale|encoder\.final_layer_norm/scale", ("vector",)),
    (r"shared/embedding", ("vocab", "embed")),
    # BLIP
    (_BLIP + r"(attention|crossattention)/self\.(query|key|value)/kernel", ("embed", "heads")),
    (_BLIP + r"(attention|crossattention)/self\.(query|key|value)/bias", ("heads",)),
    (_BLIP + r"(attention|crossattention)/output\.dense/kernel", ("heads", "embed")),
    (_BLIP + r"intermediate\.dense/kernel", ("embed", "mlp")),
    (_BLIP + r"intermediate\.dense/bias", ("mlp",)),
    (_BLIP + r"output\.dense/kernel", ("mlp", "embed")),
    (_BLIP + r"(((cross)?attention/)?output\.dense/bias|.*LayerNorm/(bias|scale))", ("vector",)),
    (r"blip\.text_encoder/embeddings\.word_embeddings/embedding", ("vocab", "embed")),
    (r"blip\.text_encoder/embeddings\.position_embeddings/embedding", ("positions", "embed")),
    (r"blip\.text_encoder/embeddings\.LayerNorm/(bias|scale)", ("vector",)),
    (_VISION + r"blocks\.\d+/attn\.qkv/kernel", ("embed", "qkv")),
    (_VISION + r"blocks\.\d+/attn\.qkv/bias", ("qkv",)),
    (_VISION + r"blocks\.\d+/attn\.proj/kernel", ("heads", "embed")),
    (_VISION + r"blocks\.\d+/mlp\.fc1/kernel", ("embed", "mlp")),
    (_VISION + r"blocks\.\d+/mlp\.fc1/bias", ("mlp",)),
    (_VISION + r"blocks\.\d+/mlp\.fc2/kernel", ("mlp", "embed")),
    (
        _VISION
        + r"(blocks\.\d+/((attn\.proj|mlp\.fc2)/bias|norm\d/(bias|scale))|norm/(bias|scale))",
        ("vector",),
    ),
    (_VISION + r"patch_embed\.proj/kernel", ("height", "width", "inputs", "vector")),
    (_VISION + r"patch_embed\.proj/bias", ("vector",)),
    (_VISION + r"(cls_token|pos_embed)", ("stack", "positions", "embed")),
    # Heads of rewards: one affine map
    (r"head/weight", ("vector",)),
    (r"head/bias", ()),
)
"""Path of a parameter -> its logical axes; the first rule that matches the whole path counts. Parameters of a scanned
run (`blocks_*`) have `layers` in front."""
HEAD_WIDTH = 64
"""Of every published network that is sharded."""
_REWARD = re.compile(r"(clip|blip)/")  # where a reward keeps its network beside a head


@functools.cache
def rule_of(path: Path) -> int:
    """Number of the rule of a parameter.

    Raises:
      InputError: no rule names it.
    """
    name = _REWARD.sub("", "/".join(path), count=1)
    for number, (pattern, _) in enumerate(RULES):
        if re.fullmatch(pattern, name):
            return number
    raise InputError(
        f"parameter {'/'.join(path)}: expected a rule of marble_jax.distributed.sharding for it; received none"
    )


def logical_axes(path: Path, rank: int) -> tuple[str, ...]:
    """Names of the axes of a parameter, or of an adapter's leaf `a` [in, rank] or `b` [rank, out].

    Raises:
      InputError: no rule, or one for another number of axes.
    """
    if path[-1] in ("a", "b"):
        inner, outer = RULES[rule_of((*path[:-1], "kernel"))][1]
        names: tuple[str, ...] = (inner, "rank") if path[-1] == "a" else ("rank", outer)
    else:
        names = RULES[rule_of(path)][1]
    if path[0].startswith("blocks_"):
        names = ("layers", *names)
    if len(names) != rank:
        raise InputError(
            f"parameter {'/'.join(path)}: expected {len(names)} axes ({', '.join(names) or 'none'}); "
            f"received {rank}"
        )
    return names


def spec_of(
    mesh: Mesh | AbstractMesh,
    network: str,
    path: Path,
    shape: tuple[int, ...],
    head_width: int = HEAD_WIDTH,
) -> PartitionSpec:
    """Axes of the mesh that a parameter is split over; an axis that does not divide is not split.

    Args:
      mesh: the devices.
      network: a key of `TABLES`.
      path: of the parameter.
      shape: of the parameter.
      head_width: of the network, so that no head is split.

    Raises:
      InputError: as `logical_axes`.
    """
    names = logical_axes(path, len(shape))
    wanted = nn.logical_to_mesh_axes(names, TABLES[network])
    units = [
        length // head_width if name == "heads" and length % head_width == 0 else length
        for name, length in zip(names, shape, strict=True)
    ]
    return PartitionSpec(
        *(
            axis
            if axis is not None and mesh.shape[axis] > 1 and unit % mesh.shape[axis] == 0
            else None
            for axis, unit in zip(wanted, units, strict=True)
        )
    )


def sharding_of(
    mesh: Mesh | AbstractMesh,
    network: str,
    path: Path,
    shape: tuple[int, ...],
    head_width: int = HEAD_WIDTH,
) -> NamedSharding:
    """`spec_of` as a sharding; arguments and errors as there."""
    return NamedSharding(mesh, spec_of(mesh, network, path, shape, head_width))


def place_over_host(network: str) -> Callable[[Path, Any], jax.Array] | None:
    """What splits the weights of a network that every host runs for itself over its own devices; None for one device.

    Text encoders are the larger part of a model (T5-XXL alone takes 9.5 GB), and a device that held them whole would
    have little room for anything else.
    """
    mesh = device_mesh.host_mesh()
    return (
        None
        if mesh.size == 1
        else lambda path, leaf: device_mesh.read_sharded(
            sharding_of(mesh, network, path, leaf.shape), leaf
        )
    )


def shardings(
    mesh: Mesh | AbstractMesh, network: str, shapes: Mapping[str, Any], head_width: int = HEAD_WIDTH
) -> dict[str, Any]:
    """Shardings of all parameters of a network, as a tree; arguments and errors as `spec_of`."""
    flat = traverse_util.flatten_dict(dict(shapes))
    return traverse_util.unflatten_dict(
        {
            path: sharding_of(mesh, network, path, tuple(leaf.shape), head_width)
            for path, leaf in flat.items()
        }
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Bytes of a network's parameters.

    Attributes:
      total: of all of them, once.
      device: on one device.
      unsplit: of parameters that a rule would split and that no device count here divides, whole on every device.
    """

    total: int
    device: int
    unsplit: int


def layout(
    mesh: Mesh | AbstractMesh, network: str, shapes: Mapping[str, Any], head_width: int = HEAD_WIDTH
) -> Layout:
    """How many bytes lie where; arguments and errors as `spec_of`."""
    total = device = unsplit = 0
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        size = leaf.size * leaf.dtype.itemsize
        spec = spec_of(mesh, network, path, tuple(leaf.shape), head_width)
        wanted = nn.logical_to_mesh_axes(logical_axes(path, len(leaf.shape)), TABLES[network])
        parts = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        total, device = total + size, device + size // parts
        unsplit += (
            size if parts == 1 and any(axis and mesh.shape[axis] > 1 for axis in wanted) else 0
        )
    return Layout(total, device, unsplit)


def describe(
    mesh: Mesh | AbstractMesh, network: str, shapes: Mapping[str, Any], head_width: int = HEAD_WIDTH
) -> str:
    """`layout` in words."""
    found = layout(mesh, network, shapes, head_width)
    over = " x ".join(
        f"{axis} {mesh.shape[axis]}" for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1
    )
    if not over:
        return "replicated"
    unsplit = (
        f", {found.unsplit / 1e6:.0f} MB of it on every device as no axis divides"
        if found.unsplit
        else ""
    )
    return f"sharded over {over}: {found.device / 1e9:.2f} of {found.total / 1e9:.2f} GB a device{unsplit}"


@dataclasses.dataclass(frozen=True)
class Gather:
    """Puts weights of the transformer together over `fsdp`, inside a compiled function.

    Left to itself the compiler may split the products instead, and then exchanges activations, which are larger.

    Attributes:
      mesh: the devices.
      head_width: of the transformer.
    """

    mesh: Mesh
    head_width: int = HEAD_WIDTH

    def __call__(self, path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters under `path`, one block of a run as `block_0`, with every axis whole that `fsdp` splits."""
        flat = traverse_util.flatten_dict(dict(params))
        for name, leaf in flat.items():
            spec = spec_of(self.mesh, "transformer", (*path, *name), leaf.shape, self.head_width)
            if "fsdp" in spec:
                whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
                flat[name] = jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, whole))
        return traverse_util.unflatten_dict(flat)


def gather(mesh: Mesh, head_width: int = HEAD_WIDTH) -> Gather | None:
    """How blocks put their weights together on a mesh; None where every device holds them whole."""
    return Gather(mesh, head_width) if mesh.shape["fsdp"] > 1 else None
