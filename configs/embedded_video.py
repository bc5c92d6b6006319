"""The shipped tiny video pipeline on five rewards, some of which oppose each other: minutes on two CPU cores.

    marble-jax train --config=configs/embedded_video.py --workdir=runs/video

Clips of five frames of 48 px: shapes and two-letter signs that move as the prompt tells or stand still. `motion` wants
what is told to move to move so; `smoothness` is best where nothing moves, `compressibility` where there is little to
see, and `ocr` and `geneval` want signs and shapes that can be read and counted in the first, middle and last frame.

A preset is a row of the table below: what it changes. '' is MARBLE; `only_*` train on one reward and evaluate the
others; `smoke` takes a few seconds, for tests.
"""

from marble_jax.config import default_config
from marble_jax.errors import one_of

SOURCES = ("signs", "things")
REWARDS = ("motion", "smoothness", "ocr", "geneval", "compressibility")
HELDOUT = ("flicker", "block_dynamic_degree", "block_motion_smoothness")
# One over the standard deviation of the base model's scores: every reward has the same say in a sum.
SUM_WEIGHTS = (1.8, 60.0, 2.9, 2.5, 2000.0)
PRESETS = {
    "": {},
    "amortized": {"harmonize.mode": "amortized"},
    "weighted_sum": {"advantages.scalarize": "weighted_sum", "advantages.weights": SUM_WEIGHTS},
    "equal": {"harmonize.balancer": "equal", "harmonize.normalize": False},
    "only_motion": {"rewards.train": ("motion",)},
    "only_smoothness": {"rewards.train": ("smoothness",)},
    "only_ocr": {
        "rewards.train": ("ocr",),
        "prompts.sources": ("signs",),
        "evaluation.sources": SOURCES,
    },
    "only_geneval": {
        "rewards.train": ("geneval",),
        "prompts.sources": ("things",),
        "evaluation.sources": SOURCES,
    },
    "only_compressibility": {"rewards.train": ("compressibility",)},
    "smoke": {
        "rollout.prompts_per_step": 3,
        "rollout.images_per_prompt": 4,
        "rollout.batch_size": 12,
        "rollout.num_steps": 4,
        "training.num_steps": 3,
        "training.micro_batch_size": 12,
        "training.timestep_fraction": 0.5,
        "harmonize.refresh_every": 2,
        "harmonize.chunk_size": 12,
        "evaluation.num_prompts": 6,
        "evaluation.every_steps": 0,
        "evaluation.num_steps": 4,
        "evaluation.num_images": 3,
        "checkpoints.every_steps": 1,
    },
}


def get_config(preset: str = ""):
    one_of("preset of configs/embedded_video.py", preset, PRESETS)
    config = default_config()
    config.name = "embedded-video" + (f"-{preset}" if preset else "")
    config.model.update(
        path="embedded_video",
        dtype="float32",
        num_frames=5,
        height=48,
        width=48,
        max_sequence_length=16,
        unroll=2,
    )
    config.prompts.path = "embedded_video"
    config.rewards.update(path="embedded_video", train=REWARDS, frames="count:3")
    config.lora.update(rank=16, alpha=32.0)
    config.rollout.update(
        prompts_per_step=18, images_per_prompt=8, batch_size=72, num_steps=6, merge_adapter=True
    )
    config.training.update(
        num_steps=60, micro_batch_size=72, timestep_fraction=0.5, learning_rate=1e-3
    )
    config.harmonize.update(refresh_every=5, chunk_size=36, anchor_every=4)
    config.rollout_policy.update(schedule="linear_capped", rate=0.001, cap=0.5)
    config.evaluation.update(
        num_prompts=240, images_per_prompt=2, every_steps=30, num_steps=6, solver="dpm2"
    )
    config.checkpoints.update(every_steps=10, keep=2)
    config.update_from_flattened_dict(PRESETS[preset])
    config.rewards.heldout = (
        *(name for name in REWARDS if name not in config.rewards.train),
        *HELDOUT,
    )
    return config
