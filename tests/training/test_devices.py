"""A step on four devices: the same mathematics, and each device works on its own samples only."""

from __future__ import annotations

import fake_devices


def steps() -> dict[str, object]:
    """Runs in the process with four devices: both steps there and on one, as differences and shapes of products."""
    import re

    import jax
    import numpy as np
    import toy_policy as toy

    from marble_jax.distributed import device_mesh
    from marble_jax.training.step_schedule import make_steps

    assert jax.device_count() == 4
    mesh = device_mesh.make_mesh(2, 2)
    found = {}
    sizes = {"micro_batch": 12, "chunk": 4}
    split = make_steps(
        toy.recipe(**sizes, shards=device_mesh.Shards(mesh)),
        toy.velocity,
        toy.optimizer(),
        "amortized",
        2,
    )
    alone = make_steps(toy.recipe(**sizes), toy.velocity, toy.optimizer(), "amortized", 2)

    def everywhere(tree):
        return device_mesh.replicate(mesh, tree)

    def whole(step, *arguments):
        """A step as one program, where its groups would be several."""
        return step.trace(*arguments).lower().compile()

    batch = toy.new_batch()
    single = (toy.base_params(), batch)
    arguments = everywhere(single)
    for name in ("refresh", "between"):
        on_one = whole(getattr(alone, name), toy.new_state(), *single)
        compiled = whole(getattr(split, name), everywhere(toy.new_state()), *arguments)
        # A solve in groups on these devices is in test_latent_layout; the step in between in groups is here alone.
        on_four = split.between if name == "between" else compiled
        one, metrics = on_one(toy.new_state(), *single)
        four, found_metrics = on_four(everywhere(toy.new_state()), *arguments)
        gaps = jax.tree.map(
            lambda x, y: float(
                np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)), initial=0)
            ),
            one.current,
            four.current,
        )
        rows = {int(r) for r in re.findall(r"= f32\[(\d+),6\]\S* dot\(", compiled.as_text())}
        found[name] = {
            "gap": max(jax.tree.leaves(gaps)),
            "rows": sorted(rows),
            "norms": [
                float(metrics["training/grad_norm"]),
                float(found_metrics["training/grad_norm"]),
            ],
        }
    return found


def policy_gradient() -> dict[str, dict[str, float]]:
    """Runs in the process with four devices: three clipped, guided updates a rollout there and on one device."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    import test_policy_gradient_step as steps
    import toy_policy as toy

    from marble_jax.distributed import device_mesh
    from marble_jax.flow.guided_policy import guided_policy
    from marble_jax.harmonize.balancers import Fixed
    from marble_jax.training.several_updates import before_last, several_updates
    from marble_jax.training.train_step import exact_step

    mesh = device_mesh.make_mesh(2, 2)
    velocity = guided_policy(toy.velocity, 3.0)
    negative = {"embeds": jnp.full((1, 2, 3), 0.3), "pooled": jnp.full((1, 2), -0.2)}
    state = steps.near(toy.new_state())
    batch = steps.new_batch(state, velocity, negative)
    # A fixed alpha compiles in a fraction of the time of a solver.
    alone = steps.recipe_of(updates=3, balancer=Fixed())
    alone = dataclasses.replace(
        alone, micro_batching=toy.recipe(micro_batch=4, chunk=4).micro_batching
    )
    shards = device_mesh.Shards(mesh)
    split = dataclasses.replace(
        alone, micro_batching=toy.recipe(micro_batch=4, chunk=4, shards=shards).micro_batching
    )
    results = []
    for recipe, place in (
        (alone, lambda tree: tree),
        (split, lambda t: device_mesh.replicate(mesh, t)),
    ):
        last = exact_step(recipe, velocity, toy.optimizer())
        # Of the two updates before the last only the first is traced.
        before = jax.jit(exact_step(before_last(recipe), velocity, toy.optimizer()))
        run = jax.jit(several_updates(last, before, 3))
        results.append(run(*(place(tree) for tree in (state, toy.base_params(), batch))))
    (one, metrics), (four, found_metrics) = results
    gap = jax.tree.map(
        lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y))), one.current, four.current
    )
    names = ("training/grad_norm", "objective/ratio", "objective/outside_clip_range")
    figures = {name: [float(metrics[name]), float(found_metrics[name])] for name in names}
    return {"gap": float(max(jax.tree.leaves(gap))), "figures": figures}


def test_clipped_and_guided_updates_on_four_devices_are_those_on_one():
    found = fake_devices.call(policy_gradient, devices=4)
    assert found["gap"] < 1e-6
    for one, four in found["figures"].values():
        assert abs(one - four) < 1e-5 * one
    # The clip holds some samples and not all.
    assert 0.05 < found["figures"]["objective/outside_clip_range"][0] < 0.95


def test_devices_share_the_samples_and_agree():
    for name, found in fake_devices.call(steps, devices=4).items():
        assert found["gap"] < 1e-6, name
        one, four = found["norms"]
        assert abs(one - four) < 1e-5 * one, name
        assert 12 not in found["rows"] and 3 in found["rows"], (
            name,
            found["rows"],
        )  # 12 samples, 3 a device
