"""What runs of blocks keep for their backward pass, counted in compiled programs: gathers and activations run again."""

from __future__ import annotations

import re

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import marble_jax  # noqa: F401
from marble_jax.networks.block_remat import run_of_blocks
from marble_jax.networks.lora_dense import LoraDense

pytestmark = pytest.mark.optimized
NUM_BLOCKS, WIDTH, RANK, NUM_ROWS = 5, 64, 2, 8
UNROLLS = (1, 2, 3, 5)


class Block(nn.Module):
    """One dense layer and one activation, whose input alone its derivative needs."""

    @nn.compact
    def __call__(self, x, shared):
        return x + jnp.tanh(LoraDense(WIDTH, use_bias=False, name="dense")(x)), None


def compiled(remat, unroll, gather=None, mesh=None):
    """The gradient over adapter and input of a run of blocks, whose weights a mesh splits."""
    run = run_of_blocks(Block, "block_0", remat, gather, NUM_BLOCKS, unroll, num_shared=1)

    def loss(adapter, params, x):
        out, _ = run().apply({"params": params, "lora": adapter}, x, None)
        return jnp.sum(out**2)

    def struct(*shape, spec=()):
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    kernel = struct(NUM_BLOCKS, WIDTH, WIDTH, spec=(None, "fsdp"))
    a, b = struct(NUM_BLOCKS, WIDTH, RANK), struct(NUM_BLOCKS, RANK, WIDTH)
    x = struct(NUM_ROWS, WIDTH, spec=("fsdp",))
    arguments = ({"dense": {"a": a, "b": b}}, {"dense": {"kernel": kernel}}, x)
    return jax.jit(jax.grad(loss, (0, 2))).lower(*arguments).compile()


def places(unroll):
    """Blocks in the text of a program: those of one turn, and those behind the loop that make no whole turn."""
    turn = min(unroll, NUM_BLOCKS)
    return turn + NUM_BLOCKS % turn


@pytest.mark.parametrize(
    ("remat", "unroll", "passes"),
    [("none", 5, 1), ("products", 50, 2), *(("full", unroll, 2) for unroll in UNROLLS)],
)
def test_unrolled_blocks_run_again_what_blocks_in_a_loop_do(remat, unroll, passes):
    text = compiled(remat, unroll).as_text()
    assert len(re.findall(r" tanh\(", text)) == passes * places(unroll)


def gathers_and_bytes():
    """How often each program gathers, and the bytes of its arrays that live between operations."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))

    def gather(path, params):
        assert path == ("block_0",)
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(params, whole)

    measured = []
    for unroll in (1, NUM_BLOCKS):
        program = compiled("none", unroll, gather, mesh)
        found = re.findall(r" = \S+ all-gather(?:-start)?\(", program.as_text())
        measured.append([len(found), program.memory_analysis().temp_size_in_bytes])
    return measured


def test_weights_are_gathered_again_and_not_kept():
    """The kernel of each place of a block in the program, once in either pass."""
    (num, size), (num_unrolled, _) = fake_devices.call(gathers_and_bytes, devices=4)
    assert (num, num_unrolled) == (2, 2 * NUM_BLOCKS)
    # In a loop one block is whole at a time; the kernels of all of them alone would take as much.
    assert size < 4 * NUM_BLOCKS * WIDTH**2
