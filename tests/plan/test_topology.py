"""Devices to compile for by name: slices of TPUs, hosts of GPUs, and what is refused in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from marble_jax.distributed.accelerators import ACCELERATORS
from marble_jax.errors import InputError
from marble_jax.plan import gpu_compiler, topology


@pytest.fixture
def compilers(monkeypatch):
    """Both compilers, as far as anyone asks for their packages."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("v5p:2x2x4", "v5p", 16),
        ("v5e:4x4", "v5e", 16),
        ("h100:8", "h100", 8),
        ("b200:1", "b200", 1),
    ],
)
def test_topologies(compilers, name, kind, count):
    accelerator, number = topology.check_topology(name)
    assert (accelerator.name, number) == (kind, count)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "such as v5e:4x4"),
        ("v5e:4", "such as v5e:4x4"),
        ("v9:2x2", "expected a slice of v5e, v5p, v6e"),
        ("v6:4x4", "did you mean 'v6e'"),
        ("h100", "such as h100:8; received 'h100'"),
        ("h100:2x4", "such as h100:8; received 'h100:2x4'"),
        ("a100:0", "such as h100:8; received 'a100:0'"),
        ("h300:8", "did you mean 'h[12]00'"),
    ],
)
def test_names_that_are_none(compilers, name, message):
    with pytest.raises(InputError, match=message):
        topology.check_topology(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x4", "expected the package libtpu.*received none .pip install libtpu"),
        (
            "h100:8",
            r"expected the GPU plugin of JAX.*received none .pip install 'marble-jax\[cuda\]'",
        ),
    ],
)
def test_no_compiler(monkeypatch, name, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(InputError, match=message):
        topology.check_topology(name)


def test_gpus_come_in_hosts(monkeypatch):
    from jax.experimental import topologies

    asked = []

    def describe(name, platform, target_config, topology):
        asked.append(topology)
        return SimpleNamespace(devices=[name] * 3)

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    assert gpu_compiler.gpu_devices("h100", 3) == ["h100"] * 3
    gpu_compiler.gpu_devices("h100", 16)
    assert asked == ["1x1x3", "1x2x8"]
    with pytest.raises(
        InputError, match="whole hosts of 8; received h100:12 .nearest valid h100:16"
    ):
        gpu_compiler.gpu_devices("h100", 12)


def test_a_plugin_that_cannot_describe_a_gpu(monkeypatch):
    from jax.experimental import topologies

    def refuse(*arguments, **options):
        raise NotImplementedError("topology not\n implemented")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(
        InputError, match="expected a GPU plugin that describes.*topology not implem"
    ):
        gpu_compiler.gpu_devices("h100", 1)


@pytest.mark.parametrize("name", gpu_compiler.GPUS)
def test_a_gpu_is_described_by_the_figures_of_its_kind(name):
    text = gpu_compiler._target(name)
    accelerator = ACCELERATORS[name]
    assert f"memory_bandwidth: {int(accelerator.bandwidth)}" in text
    assert f'device_description_str: "{accelerator.kinds[0]}"' in text
    assert text.count("{") == text.count("}")


def test_the_version_of_cudnn_is_told_and_forgotten(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as asker

    before = asker.check_cudnn_version
    with gpu_compiler.cudnn_version_told():
        assert asker.check_cudnn_version() == gpu_compiler.CUDNN_VERSION
    assert asker.check_cudnn_version is before
    monkeypatch.delattr(asker, "check_cudnn_version")
    with pytest.raises(InputError, match="expected a JAX that asks for cuDNN's version"):
        with gpu_compiler.cudnn_version_told():
            pass


def test_a_program_that_jaxlib_cannot_read_is_read_from_the_compilers_own_text(tmp_path):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands")

    with pytest.raises(jax.errors.JaxRuntimeError, match="async-update"):
        topology.program_text(Unreadable(), str(tmp_path))
    with pytest.raises(jax.errors.JaxRuntimeError, match="async-update"):
        topology.program_text(Unreadable())
    (tmp_path / "module_0000.jit_step.before_optimizations.txt").write_text("the longest of all")
    (tmp_path / "module_0000.jit_step.after_optimizations.txt").write_text("the program")
    (tmp_path / "module_0001.copy.after_optimizations.txt").write_text("small")
    assert topology.program_text(Unreadable(), str(tmp_path)) == "the program"
    readable = SimpleNamespace(as_text=lambda: "as JAX has it")
    assert topology.program_text(readable, str(tmp_path)) == "as JAX has it"


COMPILE = """
from marble_jax import platform
platform.compile_elsewhere()
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from marble_jax.networks.fused_attention import FusedAttention
from marble_jax.plan import topology
from marble_jax.plan.hlo import fused_kernels
from marble_jax.plan.roofline import roofline
accelerator, count = topology.check_topology("h100:2")
devices = topology.topology_devices("h100:2")
mesh = Mesh(np.asarray(devices).reshape(2, 1, 1), ("data", "fsdp", "tensor"))
attention = FusedAttention("cudnn", mesh)
def step(q, k, v):
    def one(q, k, v):
        out, pull = jax.vjp(lambda *args: attention(*(x[None] for x in args))[0], q, k, v)
        return out, jax.vmap(pull)(jnp.stack([out, 2 * out]))
    return jax.vmap(one)(q, k, v)
sharding = NamedSharding(mesh, PartitionSpec("data"))
q = jax.ShapeDtypeStruct((4, 205, 2, 64), jnp.bfloat16, sharding=sharding)
text = topology.compile_for(jax.jit(step), (q, q, q)).as_text()
bound = roofline(text, accelerator)
print(json.dumps([*vars(fused_kernels(text)).values(), bound.flops, "all-gather" in text]))
"""


@pytest.mark.slow
def test_a_program_compiles_for_gpus_that_are_not_there():
    """cuDNN's kernels under nested vmap over two GPUs: one forward, one backward a direction, nothing exchanged."""
    if not any(importlib.util.find_spec(name) for name in gpu_compiler.PLUGINS):
        pytest.skip("JAX's GPU plugin is not installed, which holds the GPUs' compiler")
    environ = dict(os.environ)
    environ.pop("JAX_DEFAULT_MATMUL_PRECISION", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    forward, backward, flops, gathers = json.loads(done.stdout.splitlines()[-1])
    assert (forward, backward, gathers) == (1, 2, False)
    # Two samples a GPU, of an even number of tokens; two products forward and five in each of two directions.
    assert flops == (2 + 2 * 5) * 2 * (2 * 206 * 2 * 64) * 206
