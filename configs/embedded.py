"""The shipped tiny pipeline on five rewards: minutes on two CPU cores.

    marble-jax train --config=embedded --workdir=runs/first

A preset is a row of the table below: what it changes. '' is MARBLE; `only_*` train on one reward and evaluate the
others, on images of its own prompts where it does not apply to all; `smoke` takes a few seconds and no extra.
"""

from marble_jax.config import EMBEDDED_POLICY_GRADIENTS, UPSTREAM, default_config
from marble_jax.errors import one_of

SOURCES = ("general", "ocr", "geneval")
REWARDS = ("alignment", "preference", "aesthetic", "ocr", "geneval")
OPPOSED = (*REWARDS, "jpeg_compressibility")
# Where the hull's unit gradients are long, the update leans less: aesthetics, which clean images of the wrong thing
# please too, steers less than alignment.
WEIGHTED = {"harmonize.reward_weights": (0.5, 0.7, 1.7, 1.0, 0.8)}
# One over the standard deviation of the base model's scores: every reward has the same say in a sum.
SUM_WEIGHTS = (25.0, 8.6, 1.9, 3.0, 2.7)
# The same of the JPEG score, whose unit is half a megabyte.
OPPOSED_SUM_WEIGHT = 1800.0
SUM = {"advantages.scalarize": "weighted_sum", "advantages.weights": SUM_WEIGHTS}
PRESETS = {
    "": WEIGHTED,
    "exact": WEIGHTED | {"harmonize.mode": "exact"},
    "amortized": WEIGHTED | {"harmonize.mode": "amortized"},
    # Alpha of cosines cleaned of noise, averaged over some ten steps.
    "cleaned": WEIGHTED
    | {"harmonize.gram": "cleaned", "harmonize.smooth_exact": True, "harmonize.rho": 0.9},
    # Without reward weights, as upstream's own; 9 samples of a micro-batch to a device, as there.
    "upstream": {**UPSTREAM, "harmonize.upstream_ranks": 8},
    "weighted_sum": SUM,
    # Upstream's sum: scores as they are, each with weight one, so that the reward with the widest scores rules.
    "weighted_sum_raw": {"advantages.scalarize": "weighted_sum"},
    "upweighted": {
        "advantages.scalarize": "weighted_sum",
        "advantages.weights": (25.0, 8.6, 1.9, 6.0, 5.4),
    },
    "gdpo": {"advantages.scalarize": "gdpo"},
    "sequential": {
        "advantages.scalarize": "weighted_sum",
        "advantages.weights": SUM_WEIGHTS,
        "reward_schedule.stages": (
            "alignment+preference+aesthetic@general",
            "ocr@ocr",
            "geneval@geneval",
        ),
    },
    # A reward that the others do not want, on every prompt: images that compress well are plain.
    "opposed": {"rewards.train": OPPOSED},
    "opposed_sum": {
        "rewards.train": OPPOSED,
        "advantages.scalarize": "weighted_sum",
        "advantages.weights": (*SUM_WEIGHTS, OPPOSED_SUM_WEIGHT),
    },
    "equal": {"harmonize.balancer": "equal", "harmonize.normalize": False},
    "dropout": WEIGHTED
    | {
        "reward_schedule.dropout": 0.5,
        "reward_schedule.dropout_targets": ("alignment", "preference", "aesthetic"),
    },
    "only_alignment": {"rewards.train": ("alignment",)},
    "only_preference": {"rewards.train": ("preference",)},
    "only_aesthetic": {"rewards.train": ("aesthetic",)},
    "only_ocr": {
        "rewards.train": ("ocr",),
        "prompts.sources": ("ocr",),
        "evaluation.sources": SOURCES,
    },
    "only_geneval": {
        "rewards.train": ("geneval",),
        "prompts.sources": ("geneval",),
        "evaluation.sources": SOURCES,
    },
    # Other objectives, each on the sum of scores and with MARBLE.
    "flow_grpo": SUM | EMBEDDED_POLICY_GRADIENTS["flow_grpo"],
    "flow_grpo_marble": WEIGHTED | EMBEDDED_POLICY_GRADIENTS["flow_grpo"],
    "flow_grpo_fast": SUM | EMBEDDED_POLICY_GRADIENTS["flow_grpo_fast"],
    "flow_grpo_fast_marble": WEIGHTED | EMBEDDED_POLICY_GRADIENTS["flow_grpo_fast"],
    "grpo_guard": SUM | EMBEDDED_POLICY_GRADIENTS["grpo_guard"],
    "grpo_guard_marble": WEIGHTED | EMBEDDED_POLICY_GRADIENTS["grpo_guard"],
    "awm": SUM | EMBEDDED_POLICY_GRADIENTS["awm"],
    "awm_marble": WEIGHTED | EMBEDDED_POLICY_GRADIENTS["awm"],
    # Rewards that need no more than the package itself: OCR asks for an extra.
    "smoke": {
        "rewards.train": ("alignment", "preference", "aesthetic", "geneval"),
        "rewards.heldout": ("judge",),
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
ABOUT = {
    "": "MARBLE on five rewards, solved at every step; with the reward weights of this pipeline",
    "exact": "the same, said outright",
    "amortized": "a solve on the whole batch every five steps, alpha averaged and reused on gradients",
    "cleaned": "alpha of cosines cleaned of noise, averaged over some ten steps",
    "upstream": "the released code's own step, peculiarities included",
    "weighted_sum": "one advantage of a sum of scores, each over its standard deviation",
    "weighted_sum_raw": "one advantage of the plain sum of scores, as upstream's baseline has it",
    "upweighted": "the weighted sum with twice the weight on OCR and GenEval",
    "gdpo": "one advantage, the normalised sum of the rewards' own (GDPO)",
    "sequential": "one reward group after the other, each on its own prompts",
    "opposed": "MARBLE with a sixth reward that the others do not want",
    "opposed_sum": "the weighted sum with that sixth reward",
    "equal": "equal alpha without normalised gradients, missing rewards left out",
    "dropout": "MARBLE with half of three rewards left out at random",
    "only_alignment": "one reward alone: CLIP alignment",
    "only_preference": "one reward alone: preference",
    "only_aesthetic": "one reward alone: aesthetics",
    "only_ocr": "one reward alone: OCR, on its own prompts",
    "only_geneval": "one reward alone: GenEval, on its own prompts",
    "flow_grpo": "Flow-GRPO on the weighted sum: two clipped updates a rollout",
    "flow_grpo_marble": "Flow-GRPO with a gradient of every reward",
    "flow_grpo_fast": "Flow-GRPO-Fast on the weighted sum: noise in a window of two steps",
    "flow_grpo_fast_marble": "Flow-GRPO-Fast with a gradient of every reward",
    "grpo_guard": "GRPO-Guard on the weighted sum",
    "grpo_guard_marble": "GRPO-Guard with a gradient of every reward",
    "awm": "advantage-weighted matching on the weighted sum",
    "awm_marble": "advantage-weighted matching with a gradient of every reward",
    "smoke": "three small steps, seconds of training, without OCR: for tests and first tries",
}


def get_config(preset: str = ""):
    one_of("preset of embedded", preset, PRESETS)
    config = default_config()
    config.name = "embedded" + (f"-{preset}" if preset else "")
    config.model.update(
        path="embedded", dtype="float32", height=64, width=64, max_sequence_length=12, unroll=2
    )
    config.prompts.path = "embedded"
    config.rewards.update(path="embedded", train=REWARDS)
    config.lora.update(rank=16, alpha=32.0)
    config.rollout.update(
        prompts_per_step=18, images_per_prompt=8, batch_size=72, num_steps=6, merge_adapter=True
    )
    config.training.update(
        num_steps=60, micro_batch_size=72, timestep_fraction=0.5, learning_rate=1e-3
    )
    config.harmonize.update(refresh_every=5, chunk_size=36, anchor_every=4)
    config.rollout_policy.update(schedule="linear_capped", cap=0.5)
    config.evaluation.update(
        num_prompts=420, images_per_prompt=2, every_steps=30, num_steps=6, solver="dpm2"
    )
    config.checkpoints.update(every_steps=10, keep=2)
    changes = PRESETS[preset]
    trained = changes.get("rewards.train", REWARDS)
    config.rewards.heldout = (*(name for name in REWARDS if name not in trained), "judge")
    config.update_from_flattened_dict(changes)
    return config
