"""The shipped tiny pipeline on five rewards: minutes on two CPU cores.

    marble-jax train --config=configs/embedded.py --workdir=runs/first

A preset is a row of the table below: what it changes. '' is MARBLE; `only_*` train on one reward and evaluate the
others, on pictures of its own prompts where it does not apply to all; `smoke` takes a few seconds, for tests.
"""
from marble_jax.config import default_config
from marble_jax.errors import one_of

SOURCES = ("general", "ocr", "geneval")
REWARDS = ("alignment", "preference", "aesthetic", "ocr", "geneval")
PRESETS = {
    "": {},
    "exact": {"harmonize.mode": "exact"},
    "amortised": {"harmonize.mode": "amortised"},
    "faithful": {"harmonize.mode": "faithful", "rollout.integer_timesteps": True},
    "weighted_sum": {"advantages.scalarise": "weighted_sum"},
    "upweighted": {"advantages.scalarise": "weighted_sum", "harmonize.reward_weights": (1.0, 1.0, 1.0, 2.0, 2.0)},
    "gdpo": {"advantages.scalarise": "gdpo"},
    "sequential": {"advantages.scalarise": "weighted_sum",
                   "advantages.stages": ("alignment+preference+aesthetic@general", "ocr@ocr", "geneval@geneval")},
    "equal": {"harmonize.balancer": "equal", "harmonize.normalize": False},
    "dropout": {"advantages.dropout": 0.5, "advantages.dropout_targets": ("alignment", "preference", "aesthetic")},
    "only_alignment": {"rewards.train": ("alignment",)},
    "only_preference": {"rewards.train": ("preference",)},
    "only_aesthetic": {"rewards.train": ("aesthetic",)},
    "only_ocr": {"rewards.train": ("ocr",), "prompts.sources": ("ocr",), "evaluation.sources": SOURCES},
    "only_geneval": {"rewards.train": ("geneval",), "prompts.sources": ("geneval",), "evaluation.sources": SOURCES},
    "smoke": {"rollout.prompts_per_step": 3, "rollout.images_per_prompt": 4, "rollout.batch_size": 12,
              "rollout.num_steps": 4, "training.num_steps": 3, "training.micro_batch_size": 12,
              "training.timestep_fraction": 0.5, "harmonize.refresh_every": 2, "harmonize.chunk_size": 12,
              "evaluation.num_prompts": 6, "evaluation.every_steps": 0, "evaluation.num_steps": 4,
              "evaluation.num_pictures": 3, "checkpoints.every_steps": 1},
}


def get_config(preset: str = ""):
    one_of("preset of configs/embedded.py", preset, PRESETS)
    config = default_config()
    config.name = "embedded" + (f"-{preset}" if preset else "")
    config.model.update(path="embedded", dtype="float32", resolution=64, max_sequence_length=12)
    config.prompts.path = "embedded"
    config.rewards.update(path="embedded", train=REWARDS)
    config.lora.update(rank=16, alpha=32.0)
    config.rollout.update(prompts_per_step=18, images_per_prompt=8, batch_size=72, num_steps=6, merge_adapter=True)
    config.training.update(num_steps=60, micro_batch_size=72, timestep_fraction=0.5, learning_rate=7e-4)
    config.harmonize.update(mode="amortised", refresh_every=5, chunk_size=24)
    config.policies.update(schedule="linear_capped", rate=0.001, cap=0.5)
    config.evaluation.update(num_prompts=420, every_steps=20, num_steps=6, solver="dpm2")
    config.checkpoints.update(every_steps=10, keep=2)
    config.update_from_flattened_dict(PRESETS[preset])
    config.rewards.heldout = (*(name for name in REWARDS if name not in config.rewards.train), "judge")
    return config
