"""The shipped tiny pipeline on five rewards: minutes on two CPU cores.

    marble-jax train --config=configs/embedded.py --workdir=runs/first

Presets: '' (MARBLE), weighted_sum, gdpo, equal, exact, faithful, smoke (a few seconds, for tests).
"""
from marble_jax.config import default_config
from marble_jax.errors import one_of

PRESETS = ("", "weighted_sum", "gdpo", "equal", "exact", "faithful", "smoke")


def get_config(preset: str = ""):
    one_of("preset of configs/embedded.py", preset, PRESETS)
    config = default_config()
    config.name = "embedded" + (f"-{preset}" if preset else "")
    config.model.update(path="embedded", dtype="float32", resolution=64, max_sequence_length=12)
    config.prompts.path = "embedded"
    config.rewards.update(path="embedded", train=("alignment", "preference", "aesthetic", "ocr", "geneval"),
                          heldout=("judge",))
    config.lora.update(rank=16, alpha=32.0)
    config.rollout.update(prompts_per_step=18, images_per_prompt=8, batch_size=72, num_steps=6, merge_adapter=True)
    config.training.update(num_steps=60, micro_batch_size=72, timestep_fraction=0.5, learning_rate=7e-4)
    config.harmonize.update(mode="amortised", refresh_every=5, chunk_size=24)
    config.policies.update(schedule="linear_capped", rate=0.001, cap=0.5)
    config.evaluation.update(num_prompts=420, every_steps=20, num_steps=6, solver="dpm2")
    config.checkpoints.update(every_steps=10, keep=2)
    if preset in ("weighted_sum", "gdpo"):
        config.advantages.scalarise = preset
    elif preset == "equal":
        config.harmonize.update(balancer="equal", normalize=False)
    elif preset in ("exact", "faithful"):
        config.harmonize.mode = preset
        config.rollout.integer_timesteps = preset == "faithful"
    elif preset == "smoke":
        config.rollout.update(prompts_per_step=3, images_per_prompt=4, batch_size=12, num_steps=4)
        config.training.update(num_steps=3, micro_batch_size=12, timestep_fraction=0.5)
        config.harmonize.update(refresh_every=2, chunk_size=12)
        config.evaluation.update(num_prompts=6, every_steps=0, num_steps=4, num_pictures=3)
        config.checkpoints.every_steps = 1
    return config
