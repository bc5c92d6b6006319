"""FLOPs of a step, and the speeds that follow from its seconds."""

import dataclasses

import pytest

from marble_jax.config import HARMONIZED, POLICY_GRADIENTS, default_config, settings_of
from marble_jax.distributed.accelerators import ACCELERATORS, by_device_kind, by_name
from marble_jax.errors import InputError
from marble_jax.families.descriptions import SampleFlops
from marble_jax.programs import step_flops as of_steps
from marble_jax.programs.step_flops import network_passes, speed, step_flops
from marble_jax.training.batch_sizes import derive_sizes

SAMPLE = SampleFlops(base=10.0, forward=11.0, backward=13.0, recomputed=7.0, attention=2.0)


def made(**changes):
    config = default_config()
    for name, value in changes.items():
        room, _, leaf = name.partition("__")
        config[room][leaf] = value
    settings = settings_of(config)
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    return step_flops(settings, sizes, SAMPLE, 3.0)


def test_the_papers_step_by_hand():
    """1152 images x 25 network calls; 27648 samples: rollout and current forward, one backward pass."""
    work = made(harmonize__mode="amortized")
    assert work.rollout == 1152 * 25 * 11 and work.decode == 1152 * 3
    # The base model is asked at one in eight of 192 micro-batches of 144; a solve has two more directions there.
    assert work.between == 27648 * (11 + 11 + 13) + 24 * 144 * 10
    assert work.solve == 27648 * (11 + 11 + 13) + 24 * 144 * (10 + 2 * 13)
    assert work.solve_share == 0.1 and work.train == pytest.approx(
        0.1 * work.solve + 0.9 * work.between
    )
    assert work.trained(True) == work.solve and work.trained(False) == work.between


def test_modes_and_options(monkeypatch):
    exact = made(harmonize__mode="exact", model__remat="full", rollout__merge_adapter=True)
    assert exact.solve_share == 1 and exact.train == exact.solve == exact.between
    assert exact.recomputed == 27648 * 7 and exact.rollout == 1152 * 25 * 10
    assert made(model__remat="dots").recomputed == 27648 * 2
    assert made(model__remat="products").recomputed == 27648 * 2
    assert made(model__remat="products", model__attention="cudnn").recomputed == 0
    # On a CPU auto, the default, is none of the fused ones.
    assert made(model__remat="products", model__attention="auto").recomputed == 27648 * 2
    monkeypatch.setattr(of_steps, "choose", lambda name, dtype, platform: "splash")
    assert made(model__remat="products").recomputed == 0
    # Two forward passes and one direction at the 144 samples of a micro-batch.
    assert exact.signal == 144 * (11 + 11 + 13)
    alone = made(harmonize__mode="exact", nft__kl_weight=0.0, harmonize__anchor_every=1)
    assert alone.solve == 27648 * (11 + 11 + 2 * 13)
    upstream = made(harmonize__mode="upstream")
    assert upstream.between == 27648 * (11 + 11 + 10 + 13)
    assert (
        upstream.solve - upstream.between == 144 * 2 * 13
    )  # one micro-step has two directions more


def test_a_pass_less_where_the_rollout_policy_is_left_alone():
    work = made(harmonize__mode="exact", nft__skip_rollout_pass=True)
    asking = made(harmonize__mode="exact")
    # Of 192 micro-batches of 144 samples one in eight has anchors and asks.
    assert work.skipped == 168 * 144 * 11 and work.signal == 144 * (11 + 13)
    assert work.solve == asking.solve and asking.skipped == 0
    assert work.trained(True, skipped=True) == asking.solve - 168 * 144 * 11
    record = {"time/step_s": 20.0, "time/train_s": 10.0}
    fast = speed(work, record | {"training/rollout_skipped": 1.0}, 40, 1, None)
    slow = speed(work, record, 40, 1, None)
    share = fast["speed/train_tflops_per_device"] / slow["speed/train_tflops_per_device"]
    assert share == pytest.approx(1 - work.skipped / work.solve)


def passes(preset=None, **changes):
    config = default_config()
    config.update_from_flattened_dict(dict(preset or {}))
    config.harmonize.mode = "exact"
    config.update_from_flattened_dict(changes)
    settings = settings_of(config)
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    found = network_passes(settings, sizes)
    return found.rollout, found.forward, found.backward


def test_network_passes_of_an_image_by_hand():
    # DiffusionNFT: 24 timesteps, each of two policies with one direction; at one micro-batch in eight the base model,
    # the anchor and the divergence.
    assert passes() == (25, 24 * 2 + 3, 24 + 2 * 3)
    # Flow-GRPO: nine steps, and all passes at two prompts. 1152 images at nine steps are 72 micro-batches of 144, 36 of
    # each of two updates, which take the divergence at five of them, one in eight rounded up: at ten of 72.
    flow_grpo = POLICY_GRADIENTS["flow_grpo"]
    assert passes(flow_grpo) == (20, 2 * (9 + 9 * 10 / 72), 2 * (9 + 9 * 10 / 72))
    assert passes(flow_grpo)[1] == 20.5
    # In one update at nine of 72, and in four, of 18 micro-batches each, at three of each.
    once = {"training.updates_per_rollout": 1, "policy_gradient.clip_range": 0.0}
    assert passes(flow_grpo, **once)[1] == 2 * (9 + 9 * 9 / 72)
    assert passes(flow_grpo, **{"training.updates_per_rollout": 4})[1] == 2 * (9 + 9 * 12 / 72)
    every = {"harmonize.anchor_every": 1}
    assert passes(flow_grpo, **every) == (20, 2 * 2 * 9, 2 * 2 * 9)
    # Fast: three steps, no guidance and no divergence. GRPO-Guard asks the policy that sampled.
    assert passes(POLICY_GRADIENTS["flow_grpo_fast"]) == (10, 3, 3)
    assert passes(POLICY_GRADIENTS["grpo_guard"]) == (20, 2 * 2 * 9, 2 * 9)
    # As many for one advantage as for all rewards, and fewer cotangents between solves.
    assert passes(flow_grpo, **HARMONIZED) == passes(flow_grpo)
    amortized = passes(**{"harmonize.mode": "amortized"})
    assert amortized == pytest.approx((25, 24 * 2 + 3, 24 + 0.1 * 2 * 3))


def test_speed_of_a_step():
    work = dataclasses.replace(
        made(harmonize__mode="amortized"), rollout=6e15, decode=1e15, between=8e15, solve=9e15
    )
    record = {"time/step_s": 20.0, "time/train_s": 10.0, "harmonize/refreshed": 0.0}
    found = speed(work, record, 40, 4, ACCELERATORS["v5e"])
    assert found == pytest.approx(
        {
            "speed/images_per_s": 2.0,
            "speed/tflops_per_device": 187.5,
            "speed/mfu": 187.5 / 197,
            "speed/train_tflops_per_device": 200.0,
            "speed/train_mfu": 200 / 197,
        }
    )
    solved = speed(work, record | {"harmonize/refreshed": 1.0}, 40, 4, None)
    assert solved["speed/train_tflops_per_device"] == 225 and not any(
        "mfu" in key for key in solved
    )


def test_chips_by_the_names_jax_gives_them():
    kinds = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU v4": "v4",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
    }
    assert {kind: by_device_kind(kind).name for kind in kinds} == kinds
    assert by_device_kind("cpu") is None and by_device_kind("NVIDIA A100-SXM4-40GB") is None
    assert by_name("H200") is ACCELERATORS["h200"]
    with pytest.raises(
        InputError, match="chip: expected one of v4, v5e.*received 'v5'; did you mean"
    ):
        by_name("v5")
