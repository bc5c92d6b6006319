"""Says what blocks of splash attention fit a TPU, and the least time that they take by the compiler.

    python -m tools.attention_blocks --chips=v5e,v5p,v6e --tokens=1229,1950

Forward and backward of one layer, in bfloat16, compiled for a chip that need not be there (`pip install libtpu`). A
block that the compiler refuses is larger than the memory that it gives a kernel.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from marble_jax import platform
from marble_jax.distributed.accelerators import ACCELERATORS
from marble_jax.errors import one_line, one_of
from marble_jax.networks.fused_attention import splash, whole_blocks
from marble_jax.plan import topology
from marble_jax.plan.roofline import roofline
from tools.exit_status import exit_status

HOSTS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest slice of a kind of chip that there is a description of."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default="v5e,v5p,v6e", help="kinds of chips")
    parser.add_argument("--tokens", type=_numbers, default=(1229, 1950), help="numbers of tokens")
    parser.add_argument(
        "--blocks",
        type=_numbers,
        default=(256, 384, 512, 640, 1024, 1280),
        help="tokens of a block",
    )
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    options = parser.parse_args(argv)
    # Before the compiler is loaded: it would look for chips, and for other processes that have them.
    platform.compile_elsewhere()
    return exit_status("attention_blocks", lambda: _print_costs(options))


def _print_costs(options: argparse.Namespace) -> None:
    """A line for every chip, number of tokens and block."""
    for chip in options.chips.split(","):
        one_of("--chips", chip, tuple(HOSTS))
        device = topology.topology_devices(HOSTS[chip])[0]
        for tokens in options.tokens:
            shape = (options.samples, tokens, options.heads, options.width)
            for block in options.blocks:
                cost = _cost(chip, device, shape, block)
                print(f"{chip} {tokens} tokens, block {block}: {cost}")


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as `640,1280`."""
    return tuple(int(part) for part in text.split(","))


def _cost(chip: str, device: jax.Device, shape: tuple[int, ...], block: int) -> str:
    """The least time of one layer, or why there is none."""
    array = jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)
    )

    def layer(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> object:
        out, pull_back = jax.vjp(lambda *x: splash(*x, blocks=(block,)), q, k, v)
        return out, pull_back(cotangent)

    with tempfile.TemporaryDirectory() as dump:
        try:
            compiled = topology.compile_for(jax.jit(layer), (array,) * 4, dump)
        except jax.errors.JaxRuntimeError as error:
            return f"does not compile ({one_line(error, 120)})"
        text = topology.program_text(compiled, dump)
    bound = roofline(text, ACCELERATORS[chip])
    padded = whole_blocks(shape[1], block)
    return f"{1e3 * bound.seconds:.3f} ms at least, {padded} tokens with padding, {bound.bytes / 1e6:.0f} MB moved"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
