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

    batch = toy.new_batch()
    arguments = (everywhere(toy.base_params()), everywhere(batch))
    for name in ("refresh", "between"):
        step = getattr(split, name)
        compiled = step.trace(everywhere(toy.new_state()), *arguments).lower().compile()
        one, metrics = getattr(alone, name)(toy.new_state(), toy.base_params(), batch)
        four, found_metrics = step(everywhere(toy.new_state()), *arguments)
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


def test_devices_share_the_samples_and_agree():
    for name, found in fake_devices.call(steps, devices=4).items():
        assert found["gap"] < 1e-6, name
        one, four = found["norms"]
        assert abs(one - four) < 1e-5 * one, name
        assert 12 not in found["rows"] and 3 in found["rows"], (
            name,
            found["rows"],
        )  # 12 samples, 3 a device
