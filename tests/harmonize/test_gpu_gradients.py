"""Exact gradients in bfloat16 with fused attention on a GPU: run with `pytest -m gpu` and JAX_PLATFORMS=cuda, or by
`python -m tools.gpu`."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from stacked_trees import take

from marble_jax import tree
from marble_jax.config import settings_of
from marble_jax.distributed import device_mesh
from marble_jax.plan import aot
from marble_jax.plan.model_shapes import model_shapes
from marble_jax.training.batch_sizes import derive_sizes
from tools.benchmark import ours
from tools.benchmark.sizes import SIZES, make_problem

pytestmark = pytest.mark.gpu
REWARDS = 5


@pytest.fixture(autouse=True, scope="module")
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU; JAX's backend is {jax.default_backend()}")


def middle(**changes):
    return make_problem(dataclasses.replace(SIZES["mid"](), **changes))


def gradients(problem, core):
    """Gradients of the rewards at one micro-batch, as sums over valid samples."""
    batch = problem.batch(REWARDS)
    body = ours.with_inputs(problem, core, True)
    found = jax.jit(body)(
        problem.params, problem.current, problem.rollout, batch, ours.make_plan(problem.size, batch)
    )
    return found["gradients"] if isinstance(found, dict) else ours.mean_gradients(found).gradients


def compare(got, want):
    """Cosine and relative distance for each reward, of gradients in float32."""
    found = []
    for k in range(REWARDS):
        one, other = (
            jax.tree.map(lambda x: x.astype(jnp.float32), take(g, k)) for g in (got, want)
        )
        scale = float(tree.norm(one) * tree.norm(other))
        gap = float(tree.norm(jax.tree.map(jnp.subtract, one, other)) / tree.norm(other))
        found.append((float(tree.vdot(one, other)) / scale, gap))
    return found


@pytest.fixture(scope="module")
def half():
    problem = middle(dtype="bfloat16", attention="cudnn", chunk=8)
    return problem, gradients(problem, ours.exact(problem, True))


def test_exact_gradients_are_those_of_separate_passes(half):
    problem, got = half
    for cosine, gap in compare(got, gradients(problem, ours.separate(problem))):
        assert cosine > 0.999 and gap < 0.05


def test_exact_gradients_are_those_of_float32(half):
    _, got = half
    whole = middle(attention="einsum")
    for cosine, gap in compare(got, gradients(whole, ours.exact(whole, True))):
        assert cosine > 0.98 and gap < 0.2


def test_memory_is_bound_by_the_chunk():
    """Per-sample gradients and activations of a chunk, and not of a micro-batch."""
    taken = {}
    for chunk in (2, 16):
        problem = middle(dtype="bfloat16", attention="cudnn", chunk=chunk)
        taken[chunk] = ours.compile_program(
            problem, ours.with_inputs(problem, ours.exact(problem, True), True), REWARDS
        ).bytes
    assert taken[2] < 0.5 * taken[16]


def test_a_whole_exact_step_compiles():
    """The program that training runs, from shapes alone, for this machine's devices."""
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "embedded.py"))[
        "get_config"
    ]()
    config.model.update(dtype="bfloat16", attention="cudnn")
    config.harmonize.mode = "exact"
    mesh = device_mesh.make_mesh(devices=jax.devices()[:1])
    settings = settings_of(config)
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    jobs = aot.jobs(settings, model_shapes(settings), sizes, mesh)
    step, arguments = jobs["train, solving"]
    text = step.trace(*arguments).lower().compile().as_text()
    assert "fmhaSoftmaxBackward" in text
