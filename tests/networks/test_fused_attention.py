"""Fused attention kernels against the plain one: under nested `vmap`, in a scanned model, over several devices."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd3_lora as lora
from stacked_trees import take

from marble_jax import tree
from marble_jax.errors import InputError
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.transformer import MMDiT, abstract_params, velocity
from marble_jax.harmonize import reward_gradients
from marble_jax.networks import fused_attention
from marble_jax.networks.attention import (
    RMSNorm,
    attend,
    attend_jointly,
    choose,
    over,
    wants_flat_heads,
)
from marble_jax.networks.fused_attention import FusedAttention, block_size, folded
from marble_jax.objectives.nft import Nft, NftBatch

HERE = Path(__file__).parent
EMULATED = FusedAttention("splash", interpret=True)


class StandIn(FusedAttention):
    """The way of the fused kernels through vmap, scan and mesh, with a kernel that compiles in no time."""

    def kernel(self, q, k, v, num_tokens=None):
        assert q.ndim == k.ndim == v.ndim == 4
        return attend(unscaled(self, q), k[:, :num_tokens], v[:, :num_tokens], "einsum")


def unscaled(attention, q):
    """Queries as the reference wants them, which scales itself."""
    return q * q.shape[-1] ** 0.5 if attention.kind == "splash" else q


SMALL = MMDiTConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=10,
    caption_projection_dim=16,
    pooled_projection_dim=6,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def pulled_back(attention, q, k, v, cotangents):
    """Per sample, as exact gradients do it: the output, and gradients for each of its cotangents [N, J, Tq, H, d]."""

    def one(q, k, v, cotangents):
        out, pull = jax.vjp(lambda *args: attention(*(x[None] for x in args))[0], q, k, v)
        return out, jax.vmap(pull)(cotangents)

    return jax.jit(jax.vmap(one))(q, k, v, cotangents)


def problem(num, tokens, keys, heads, width, directions=3):
    return (
        draw(num, tokens, heads, width, seed=1),
        *(draw(num, keys, heads, width, seed=s) for s in (2, 3)),
        draw(num, directions, tokens, heads, width, seed=4),
    )


def assert_same(got, want, tolerance):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.shape == other.shape
        assert float(jnp.linalg.norm(one - other)) <= tolerance * float(jnp.linalg.norm(other))


@pytest.mark.parametrize(
    "shape",
    [(2, 37, 700, 1, 16), pytest.param((1, 1024 + 205, 1024 + 205, 2, 64), marks=pytest.mark.slow)],
)
def test_splash_agrees_with_the_reference(shape):
    """Padded queries and keys, several blocks, and the tokens of a 512 px image with 205 of text."""
    arrays = problem(*shape)
    assert_same(
        pulled_back(EMULATED, *arrays),
        pulled_back(partial(attend, implementation="einsum"), *arrays),
        2e-6,
    )


@pytest.mark.slow
def test_splash_in_bfloat16_is_as_close_as_its_dtype():
    arrays = problem(1, 256, 256, 1, 64, directions=1)
    half = [x.astype(jnp.bfloat16) for x in arrays]
    want = pulled_back(
        partial(attend, implementation="einsum"), *(x.astype(jnp.float32) for x in half)
    )
    got = jax.tree.map(lambda x: x.astype(jnp.float32), pulled_back(EMULATED, *half))
    assert_same(got, want, 2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_are_normed_alike_before_and_after_they_are_cut(dtype):
    x, scale = draw(2, 5, 3 * 16).astype(dtype), 1 + draw(16, seed=1)
    flat = RMSNorm(3).apply({"params": {"scale": scale}}, x)
    cut = RMSNorm().apply({"params": {"scale": scale}}, x.reshape(2, 5, 3, 16))
    assert flat.dtype == dtype
    # One rounding of the result at most.
    tolerance = 2e-6 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(
        np.asarray(flat, np.float32).reshape(cut.shape), np.asarray(cut, np.float32), tolerance
    )
    wide = np.asarray(x, np.float64).reshape(2, 5, 3, 16)
    want = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(scale)
    np.testing.assert_allclose(
        np.asarray(flat, np.float64).reshape(want.shape), want, tolerance, 2 * tolerance
    )


def test_heads_are_normed_whole_where_a_tpu_would_pad_them():
    assert wants_flat_heads("splash") and wants_flat_heads(FusedAttention("splash"))
    assert not wants_flat_heads("cudnn") and not wants_flat_heads("xla")
    mesh = jax.sharding.AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor"))
    assert not wants_flat_heads(FusedAttention("splash", mesh))


def test_blocks():
    assert [block_size(t) for t in (1, 205, 256, 1024, 1229, 1357, 4429)] == [
        256,
        256,
        256,
        512,
        640,
        512,
        640,
    ]


def test_a_mapped_axis_joins_the_batch():
    """A kernel that knows no vmap sees four axes, whatever is mapped over it and whichever operands are."""
    seen = []

    def kernel(q, k, v):
        seen.append((q.shape, k.shape, v.shape))
        return attend(q, k, v, "einsum")

    arrays = problem(2, 5, 6, 3, 4)
    got = pulled_back(folded(kernel), *arrays)
    assert_same(got, pulled_back(partial(attend, implementation="einsum"), *arrays), 2e-6)
    # All samples at once, a direction at a time; other batches and heads only tell what follows them.
    assert ((2, 5, 3, 4), (2, 6, 3, 4), (2, 6, 3, 4)) in seen
    assert all(k == v == (q[0], 6, *q[2:]) for q, k, v in seen)
    q, k, v, _ = arrays
    shared = jax.vmap(folded(kernel), in_axes=(1, None, None), out_axes=1)(
        jnp.stack([q, 2 * q], axis=1), k, v
    )
    np.testing.assert_allclose(shared[:, 1], attend(2 * q, k, v, "einsum"), atol=1e-6)


@pytest.mark.parametrize("kind", ["splash", "cudnn"])
def test_streams_are_joined_with_the_tokens_that_a_kernel_adds(kind, monkeypatch):
    """Two streams, padded in the one copy that joins them: what each reads, and its gradients."""
    # The stand-in takes float32.
    monkeypatch.setattr(fused_attention, "_check_cudnn", lambda q: None)
    attention = StandIn(kind)
    streams = [[draw(2, t, 2, 8, seed=s) for s in range(3)] for t in (6, 5)]

    assert attention.padding(11) == {"splash": 245, "cudnn": 1}[kind]

    def read(implementation, streams):
        first, second = attend_jointly(streams, implementation)
        return jnp.sum(jnp.sin(first)) + jnp.sum(jnp.cos(second)), (first, second)

    def run(implementation):
        return jax.value_and_grad(partial(read, implementation), has_aux=True)(streams)

    assert_same(run(attention), run("einsum"), 2e-6)
    alone = attend_jointly(streams[:1], attention)
    assert_same(alone, [attend(*streams[0], "einsum")], 2e-6)


def test_the_backward_kernel_runs_once_a_direction_and_no_forward_again():
    """What directions share is not repeated for them, and the forward kernel's results are kept."""
    calls = []

    def kernel(q, k, v):
        calls.append(q.shape[0])
        return attend(q, k, v, "einsum")

    text = str(jax.make_jaxpr(partial(pulled_back, folded(kernel)))(*problem(2, 5, 6, 3, 4)))
    # Logits and weights times values, once; then four products for each of three directions.
    assert text.count("dot_general") == 2 + 3 * 4


def exact(attention, remat="full", mesh=None):
    """Gradients of three rewards by `reward_gradients.accumulate` through a scanned and rematerialised model."""
    model = MMDiT(SMALL, remat=remat, attention=attention, lora_scale=2.0)
    shapes = abstract_params(model)
    params = jax.tree_util.tree_map_with_path(
        lambda path, s: 0.3 * draw(*s.shape, seed=len(jax.tree_util.keystr(path))), shapes
    )
    adapter = jax.eval_shape(
        lambda: lora.init_adapter(jax.random.key(0), shapes, lora.LoraSpec(2, 4.0))
    )
    adapter = jax.tree.map(lambda s: 0.2 * draw(*s.shape, seed=9), adapter)
    latents = [draw(4, 8, 8, 4, seed=s) for s in range(4)]
    batch = NftBatch(
        xt=latents[1],
        sigma=jnp.linspace(0.2, 0.9, 4),
        cond={"embeds": draw(4, 5, 10), "pooled": draw(4, 6)},
        x0=latents[0],
        v_rollout=latents[2],
        v_base=latents[3],
    )
    # The optimality r of these advantages is sigmoid(draw(3, 4)).
    advantages, valid = (
        10 * jax.nn.sigmoid(draw(3, 4)).T - 5,
        jnp.arange(12).reshape(3, 4).T % 5 > 0,
    )
    if mesh is not None:
        from marble_jax.distributed import device_mesh

        params, adapter = device_mesh.replicate(mesh, (params, adapter))
        batch = device_mesh.shard_batch(mesh, batch)

    def step(params, adapter, batch, advantages, valid):
        return reward_gradients.accumulate(
            Nft(beta=0.1),
            lambda a, *rest: velocity(model, params, a, *rest),
            adapter,
            batch,
            advantages,
            valid,
            chunk_size=4 if mesh is not None else 2,
        )

    lowered = jax.jit(step).lower(params, adapter, batch, advantages, valid)
    compiled = lowered.compile({"xla_backend_optimization_level": 0})  # for one run
    return compiled(params, adapter, batch, advantages, valid), compiled.as_text()


@pytest.fixture(scope="module")
def plain():
    return exact("einsum")[0]


@pytest.mark.parametrize(
    ("attention", "remat"),
    [
        # With "full" over devices, below.
        (StandIn("splash"), "products"),
        pytest.param(StandIn("splash"), "none", marks=pytest.mark.slow),
        pytest.param(EMULATED, "full", marks=pytest.mark.slow),
    ],
)
def test_exact_gradients_of_a_scanned_model(plain, attention, remat):
    got, _ = exact(attention, remat)
    for k in range(3):
        want = take(plain.gradients, k)
        gap = jax.tree.map(jnp.subtract, take(got.gradients, k), want)
        assert float(tree.norm(gap)) <= 1e-5 * float(tree.norm(want)) and float(tree.norm(want)) > 0


def over_devices(file: str) -> dict[str, object]:
    """Runs in a process with eight devices, two along `tensor`: the exact gradients there, against those in `file`."""
    devices = np.asarray(jax.devices())
    assert devices.size == 8
    mesh = jax.sharding.Mesh(devices.reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    got, text = exact(StandIn("splash", mesh), mesh=mesh)
    want = list(np.load(file).values())
    gap = [np.asarray(x) - y for x, y in zip(jax.tree.leaves(got.gradients), want, strict=True)]
    size = lambda values: float(
        np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in values))
    )
    scores = {(int(n), int(h)) for n, h in re.findall(r"f32\[(\d+),(\d),256,21\]", text)}
    return {"gap": size(gap) / size(want), "scores": sorted(scores)}


def test_devices_run_the_kernel_on_their_own_samples_and_heads(plain, tmp_path):
    file = tmp_path / "gradients.npz"
    np.savez(file, *(np.asarray(x) for x in jax.tree.leaves(plain.gradients)))
    found = fake_devices.call(over_devices, file)
    assert found["gap"] < 1e-5
    # One sample and one direction at a time, with one of the two heads.
    assert found["scores"] == [[1, 1]]


def test_what_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    placed = FusedAttention("splash", mesh)
    assert placed.spec((8, 5, 4, 8)) == jax.sharding.PartitionSpec(
        ("data", "fsdp"), None, "tensor", None
    )
    assert placed.spec((1, 5, 3, 8)) == jax.sharding.PartitionSpec(None, None, None, None)
    without = FusedAttention("splash", jax.sharding.AbstractMesh((4, 1), ("data", "fsdp")))
    assert without.spec((8, 5, 4, 8)) == jax.sharding.PartitionSpec(
        ("data", "fsdp"), None, None, None
    )


def test_auto_takes_what_fits():
    assert (
        choose("auto", jnp.bfloat16, "gpu") == "cudnn"
        and choose("auto", jnp.float32, "gpu") == "xla"
    )
    assert (
        choose("auto", jnp.bfloat16, "tpu") == "splash"
        and choose("auto", jnp.float32, "tpu") == "xla"
        and choose("auto", jnp.bfloat16, "cpu") == "xla"
    )
    assert choose("einsum", jnp.bfloat16, "tpu") == "einsum"
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    # A run of a TPU pod or of a GPU, opened here.
    assert [over(name, jnp.bfloat16, mesh) for name in ("splash", "cudnn", "auto", "einsum")] == [
        "xla",
        "xla",
        "xla",
        "einsum",
    ]
    q = draw(1, 3, 1, 8)
    np.testing.assert_array_equal(attend(q, q, q, "auto"), attend(q, q, q, "xla"))


def test_cudnn_gets_an_even_number_of_tokens(monkeypatch):
    """The token that is added is masked as a key and cut off as a query; XLA takes the same arguments."""
    lengths, product = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, *, key_value_seq_lengths, implementation):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        lengths.append(q.shape[1])
        return product(q, k, v, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    arrays = problem(2, 7, 7, 2, 8)
    want = pulled_back(partial(attend, implementation="einsum"), *arrays)
    assert_same(pulled_back(folded(fused_attention.cudnn), *arrays), want, 2e-6)
    assert set(lengths) == {8}
    jax.eval_shape(fused_attention.cudnn, *problem(2, 6, 6, 2, 8)[:3])
    assert lengths[-1] == 6


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (
            jnp.float32,
            64,
            "attention 'cudnn': expected float16 or bfloat16; received float32 .use 'xla'",
        ),
        (
            jnp.bfloat16,
            12,
            "attention 'cudnn': expected a head width of 8, 16, ... or 128; received 12",
        ),
    ],
)
def test_what_cudnn_cannot_do(dtype, width, message):
    q = jnp.zeros((1, 4, 1, width), dtype)
    with pytest.raises(InputError, match=message):
        attend(q, q, q, "cudnn")


COMPILE = """
from marble_jax import platform
platform.compile_elsewhere()
import jax, jax.numpy as jnp, numpy as np, json
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from marble_jax.networks.fused_attention import FusedAttention
devices = list(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
mesh = Mesh(np.asarray(devices).reshape(2, 1, 2), ("data", "fsdp", "tensor"))
attention = FusedAttention("splash", mesh)
def step(q, k, v, cotangents):
    def one(q, k, v, cotangents):
        out, pull = jax.vjp(lambda *args: attention(*(x[None] for x in args)), q, k, v)
        return out[0], jax.vmap(pull)(cotangents)
    return jax.vmap(one)(q, k, v, cotangents)
found = []
for num, tokens, heads, width in ((4, 21, 2, 8), (4, 1229, 24, 64)):
    struct = lambda *shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    q, cotangents = struct(num, tokens, heads, width), struct(num, 3, 1, tokens, heads, width)
    text = jax.jit(step).trace(q, q, q, cotangents).lower(lowering_platforms=("tpu",)).compile().as_text()
    found.append([text.count("tpu_custom_call"), text.count("all-gather")])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_splash_compiles_for_a_tpu_slice():
    """The kernel's forward and backward passes under nested vmap over 2 x 2 devices, by the TPU's own compiler."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed, which holds the TPU's compiler")
    environ = {
        name: value for name, value in os.environ.items() if name != "JAX_DEFAULT_MATMUL_PRECISION"
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env=environ,
    )  # the kernel's products of bfloat16 have no higher precision
    assert done.returncode == 0, done.stderr[-3000:]
    for calls, gathers in json.loads(done.stdout.splitlines()[-1]):
        assert calls >= 4 and gathers == 0
