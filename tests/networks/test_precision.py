"""Products of float32 as they are traced: no factor is rounded first, and half precision asks for no more.

CPUs multiply float32 whatever is asked, so that numbers would not tell.
"""

from __future__ import annotations

import functools
import re

import flux1_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wan_models
from transformer_checks import gradient_of

import marble_jax  # noqa: F401
from marble_jax.families.flux1 import transformer as flux1
from marble_jax.families.flux1.family import FAMILY as FLUX1
from marble_jax.families.sd3 import transformer as sd3
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.family import FAMILY as SD3
from marble_jax.families.wan import transformer as wan
from marble_jax.families.wan.family import FAMILY as WAN
from marble_jax.networks.fused_attention import FusedAttention
from marble_jax.trainable import lora

SD3_TINY = MMDiTConfig(
    sample_size=16, in_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=10,
    caption_projection_dim=16, pooled_projection_dim=6, out_channels=3, pos_embed_max_size=12,
    dual_attention_layers=(0,), qk_norm="rms_norm",
)  # fmt: skip


def sd3_inputs():
    cond = {"embeds": np.ones((2, 5, 10), np.float32), "pooled": np.ones((2, 6), np.float32)}
    return np.ones((2, 8, 12, 3), np.float32), np.ones(2, np.float32), cond


MODELS = {
    "sd3": (sd3, SD3, lambda: sd3.MMDiT(SD3_TINY), sd3_inputs),
    "flux1": (
        flux1,
        FLUX1,
        lambda: flux1.FluxTransformer(flux1_models.DEV, embedded_guidance=flux1_models.GUIDANCE),
        lambda: flux1_models.inputs(flux1_models.DEV),
    ),
    "wan": (wan, WAN, lambda: wan.WanTransformer(wan_models.TINY), wan_models.inputs),
}


@functools.cache
def traced(name, dtype, **changes):
    """A gradient over the adapter as users trace it: the tests' own setting is the highest precision everywhere."""
    module, family, make, inputs = MODELS[name]
    # Shapes are those of the model as it is made, which is traced once for all changes.
    if name == "wan":
        params = module.abstract_params(make(), dtype)
    else:
        weights = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype)
        params = jax.tree.map(weights, module.abstract_params(make()))
    spec = lora.LoraSpec(3, 6.0, family.default_targets)
    adapter = jax.eval_shape(
        lambda: lora.init_adapter(jax.random.key(0), family.layers_at, params, spec)
    )
    model = make().clone(dtype=dtype, **changes)
    gradient = jax.jit(gradient_of(module.velocity), static_argnums=0)
    with jax.default_matmul_precision("default"):
        return gradient.trace(model, params, adapter, *inputs())


def equations(jaxpr):
    """Every equation of a program, those of loops and calls in it as well."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(program):
    """(types of the factors, whether the highest precision is asked for) of all products of a traced program."""
    found = []
    for equation in equations(program.jaxpr.jaxpr):
        if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
            continue
        precision = equation.params["precision"]
        # JAX's attention of bfloat16 names its arithmetic itself: factors of bfloat16, whatever type they come in.
        if isinstance(precision, jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset):
            continue
        factors = frozenset(str(factor.aval.dtype) for factor in equation.invars)
        found.append((factors, precision == HIGHEST))
    return found


def lowered_products(program):
    """The same of what compilers are given, in their words for the types."""
    with jax.default_matmul_precision("default"):
        text = program.lower().as_text()
    found = []
    for line in text.splitlines():
        is_product = re.search(r"stablehlo\.(dot_general|convolution)\b", line)
        if not is_product or "algorithm = " in line:
            continue
        factors = re.search(r" : \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", line)
        found.append((frozenset(factors.groups()), line.count("HIGHEST") == 2))
    return found


def test_compilers_are_given_what_is_traced():
    """Of a model that has both kinds of products."""
    program = traced("sd3", jnp.bfloat16, stream_dtype=jnp.float32)
    words = {"float32": "f32", "bfloat16": "bf16"}
    wanted = {
        (frozenset(words[factor] for factor in factors), highest)
        for factors, highest in products(program)
    }
    found = lowered_products(program)
    assert len(found) > 20
    assert set(found) == wanted
    assert {highest for _, highest in found} == {True, False}


# The arithmetic of attention is the same for every family.
@pytest.mark.parametrize(
    "name, attention", [("sd3", "xla"), ("flux1", "xla"), ("wan", "xla"), ("sd3", "einsum")]
)
def test_a_float32_model_rounds_no_factor(name, attention):
    found = products(traced(name, jnp.float32, attention=attention))
    assert len(found) > 30
    assert all(factors == {"float32"} and highest for factors, highest in found)


@pytest.mark.parametrize("name", ["sd3", "flux1"])
def test_a_bfloat16_model_is_multiplied_in_one_pass(name):
    found = products(traced(name, jnp.bfloat16))
    assert len(found) > 30
    assert not any(highest for _, highest in found)


@pytest.mark.parametrize("name, least", [("sd3", 2), ("flux1", 2), ("wan", 4)])
def test_float32_parts_of_a_bfloat16_model_round_no_factor(name, least):
    """The head's projection, that of the last modulation in two families, and in Wan the embedded noise level."""
    found = products(traced(name, jnp.bfloat16, stream_dtype=jnp.float32))
    assert all(factors == {"float32"} for factors, highest in found if highest)
    assert sum(highest for _, highest in found) >= least
    assert not any("float32" in factors and not highest for factors, highest in found)


@pytest.mark.parametrize("dtype, around", [(jnp.float32, "default"), (jnp.bfloat16, "highest")])
def test_the_fused_kernel_of_tpus_multiplies_by_its_type(dtype, around):
    """Forward and backward, whose own derivative is traced later; more passes of bfloat16 do not compile on TPUs."""
    x = jnp.ones((1, 256, 1, 64), dtype)

    def pulled(q, g):
        out, pull = jax.vjp(FusedAttention("splash", interpret=True), q, q, q)
        return out, pull(g)

    with jax.default_matmul_precision(around):
        text = str(jax.make_jaxpr(pulled)(x, x))
    num = len(re.findall(r"\bdot_general\[", text))
    exact = len(re.findall(r"precision=\(Precision\.HIGHEST, Precision\.HIGHEST\)", text))
    # Two forward; backward the logits again, three cotangents and that of the weights.
    assert num >= 7
    assert exact == (num if dtype == jnp.float32 else 0)
