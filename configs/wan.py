"""Wan2.1-T2V-1.3B: LoRA of rank 32 on its attention, MARBLE in amortized mode, on pictures or on clips.

    marble-jax train --config=wan:240p_8x80gb --workdir=runs/wan

`picture` draws 480 x 832 px, `240p` clips of 17 frames of 240 x 416, `480p` clips of 33 frames of 480 x 832. Rollouts
take 10 dpm2 steps with guidance 4.5, without which the base model blurs; four of the ten noise levels are trained on,
as a step's time is nearly all in the network. Rewards of images see three frames of a clip, OCR reads the first, middle
and last one, and `motion` keeps clips from freezing; smoothness, flicker and a dynamic degree are only evaluated. The
prompts are the ready-made sets. Not run by this project yet: a run takes large accelerators. `model.path` is a
diffusers directory or hub id (Apache-2.0).

`picture`, `240p` and `480p` are for eight GPUs of 80 GB. `marble-jax plan --config=wan:PRESET` with the
options below says, in GB of the largest program and what lies beside it on a device (the reward models take some 12 GB
more) and seconds of a step at 40 % of the peak, rewards apart:

| preset         | options of plan           | GB of usable  | samples a step | s a step |
|----------------|---------------------------|---------------|----------------|----------|
| picture_80gb   | --devices=1 --chip=h100   | 43.5 of 64.4  | 24 x 12        | 130      |
| picture_8x80gb | --devices=8 --chip=h100   | 14.8 of 64.4  | 48 x 24        | 65       |
| picture_v5p_16 | --devices=16 --chip=v5p   | 11.7 of 102.8 | 48 x 24        | 70       |
| picture_v6e_16 | --devices=16 --chip=v6e   | 9.2 of 33.5   | 48 x 24        | 35       |
| 240p_80gb      | --devices=1 --chip=h100   | 16.2 of 64.4  | 24 x 12        | 173      |
| 240p_8x80gb    | --devices=8 --chip=h100   | 15.9 of 64.4  | 48 x 24        | 86       |
| 240p_v5p_16    | --devices=16 --chip=v5p   | 12.5 of 102.8 | 48 x 24        | 93       |
| 240p_v6e_16    | --devices=16 --chip=v6e   | 9.5 of 33.5   | 48 x 24        | 46       |
| 480p_80gb      | --devices=1 --chip=h100   | 46.6 of 64.4  | 12 x 12        | 1076     |
| 480p_8x80gb    | --devices=8 --chip=h100   | 15.1 of 64.4  | 24 x 24        | 538      |
| 480p_v5p_16    | --devices=16 --chip=v5p   | 18.4 of 102.8 | 24 x 24        | 580      |
| 480p_v6e_16    | --devices=16 --chip=v6e   | 11.1 of 33.5  | 24 x 24        | 290      |

`flow_grpo`, `flow_grpo_fast`, `grpo_guard` and `awm` train clips of 33 frames of 240 x 416 on eight GPUs of 80 GB with
other objectives and one advantage of the sum of scores, and with `_marble` behind the name on every reward's own
gradient. Flow-GRPO's are its published settings for this model but for the sizes (groups of 4 there): 20 steps,
guidance 4.5 in rollouts and training, clip 1e-3, divergence 0.004, learning rate 1e-4, advantages over the standard
deviation of their group; Fast and GRPO-Guard keep their constants of SD3.5-medium in 20 steps, as advantage-weighted
matching does in 14: none are published for Wan.

At 480p the weights are split over all devices but on the single GPU (`mesh.fsdp`); elsewhere every device holds them.
"""

from marble_jax.config import HARMONIZED, POLICY_GRADIENTS, default_config
from marble_jax.errors import one_of

IMAGE_REWARDS = ("pickscore", "hpsv2", "clipscore")
# What a clip is drawn as: (frames, height, width, rewards trained on, rewards only evaluated).
SAMPLES = {
    "picture": (1, 480, 832, (*IMAGE_REWARDS, "ocr"), ("aesthetic", "imagereward")),
    "240p": (
        17,
        240,
        416,
        (*IMAGE_REWARDS, "video_ocr", "motion"),
        ("smoothness", "flicker", "block_dynamic_degree"),
    ),
    "240p_33": (
        33,
        240,
        416,
        (*IMAGE_REWARDS, "video_ocr", "motion"),
        ("smoothness", "flicker", "block_dynamic_degree"),
    ),
    "480p": (
        33,
        480,
        832,
        (*IMAGE_REWARDS, "video_ocr", "motion"),
        ("smoothness", "flicker", "block_dynamic_degree"),
    ),
}
# Where it runs: (attention, mesh.fsdp, prompts x images a step, rollout batch, micro-batch, chunk a device)
PLACES = {
    ("picture", "80gb"): ("cudnn", 1, (24, 12), 48, 24, 8),
    ("picture", "8x80gb"): ("cudnn", 1, (48, 24), 384, 192, 8),
    ("picture", "v5p_16"): ("splash", 1, (48, 24), 576, 192, 4),
    ("picture", "v6e_16"): ("splash", 1, (48, 24), 576, 64, 2),
    ("240p", "80gb"): ("cudnn", 1, (24, 12), 48, 24, 8),
    ("240p", "8x80gb"): ("cudnn", 1, (48, 24), 384, 192, 8),
    ("240p", "v5p_16"): ("splash", 1, (48, 24), 576, 192, 4),
    ("240p", "v6e_16"): ("splash", 1, (48, 24), 192, 64, 2),
    ("240p_33", "8x80gb"): ("cudnn", 1, (48, 24), 192, 96, 4),
    ("480p", "80gb"): ("cudnn", 1, (12, 12), 8, 4, 2),
    ("480p", "8x80gb"): ("cudnn", 8, (24, 24), 64, 32, 2),
    ("480p", "v5p_16"): ("splash", 16, (24, 24), 64, 64, 2),
    ("480p", "v6e_16"): ("splash", 16, (24, 24), 32, 16, 1),
}
# What differs from the settings for SD3.5-medium; the guidance is the same for all, as the base model needs it.
ON_CLIPS = {
    "flow_grpo": {
        "rollout.num_steps": 20,
        "policy_gradient.clip_range": 1e-3,
        "policy_gradient.kl_weight": 0.004,
        "advantages.scale": "group",
        "training.timestep_fraction": 1.0,
    },
    "flow_grpo_fast": {"rollout.num_steps": 20, "training.timestep_fraction": 1.0},
    "grpo_guard": {"rollout.num_steps": 20, "training.timestep_fraction": 1.0},
    "awm": {},
}
PRESETS = (
    "picture",
    "240p",
    "480p",
    "picture_80gb",
    "picture_8x80gb",
    "picture_v5p_16",
    "picture_v6e_16",
    "240p_80gb",
    "240p_8x80gb",
    "240p_v5p_16",
    "240p_v6e_16",
    "480p_80gb",
    "480p_8x80gb",
    "480p_v5p_16",
    "480p_v6e_16",
    "flow_grpo",
    "flow_grpo_marble",
    "flow_grpo_fast",
    "flow_grpo_fast_marble",
    "grpo_guard",
    "grpo_guard_marble",
    "awm",
    "awm_marble",
)
ABOUT = {
    "picture": "pictures of 480 x 832, on eight GPUs of 80 GB",
    "240p": "clips of 17 frames of 240 x 416, on eight GPUs of 80 GB",
    "480p": "clips of 33 frames of 480 x 832, on eight GPUs of 80 GB",
    "picture_80gb": "pictures of 480 x 832, on one GPU of 80 GB, fewer a step",
    "picture_8x80gb": "pictures of 480 x 832, on eight GPUs of 80 GB",
    "picture_v5p_16": "pictures of 480 x 832, on 16 chips of TPU v5p",
    "picture_v6e_16": "pictures of 480 x 832, on 16 chips of TPU v6e",
    "240p_80gb": "clips of 17 frames of 240 x 416, on one GPU of 80 GB, fewer a step",
    "240p_8x80gb": "clips of 17 frames of 240 x 416, on eight GPUs of 80 GB",
    "240p_v5p_16": "clips of 17 frames of 240 x 416, on 16 chips of TPU v5p",
    "240p_v6e_16": "clips of 17 frames of 240 x 416, on 16 chips of TPU v6e",
    "480p_80gb": "clips of 33 frames of 480 x 832, on one GPU of 80 GB, fewer a step",
    "480p_8x80gb": "clips of 33 frames of 480 x 832, on eight GPUs of 80 GB",
    "480p_v5p_16": "clips of 33 frames of 480 x 832, on 16 chips of TPU v5p",
    "480p_v6e_16": "clips of 33 frames of 480 x 832, on 16 chips of TPU v6e",
    "flow_grpo": "Flow-GRPO on a sum of scores, on eight GPUs of 80 GB",
    "flow_grpo_marble": "Flow-GRPO with a gradient of every reward",
    "flow_grpo_fast": "Flow-GRPO-Fast on a sum of scores",
    "flow_grpo_fast_marble": "Flow-GRPO-Fast with a gradient of every reward",
    "grpo_guard": "GRPO-Guard on a sum of scores",
    "grpo_guard_marble": "GRPO-Guard with a gradient of every reward",
    "awm": "advantage-weighted matching on a sum of scores",
    "awm_marble": "advantage-weighted matching with a gradient of every reward",
}


def get_config(preset: str = PRESETS[0]):
    one_of("preset of wan", preset, PRESETS)
    objective = preset.removesuffix("_marble")
    if objective in POLICY_GRADIENTS:
        sample, place = "240p_33", "8x80gb"
    else:
        sample = next(name for name in SAMPLES if preset.startswith(name))
        place = preset.removeprefix(sample).removeprefix("_") or "8x80gb"
    frames, height, width, rewards, heldout = SAMPLES[sample]
    attention, fsdp, (prompts, images), batch, micro_batch, chunk = PLACES[sample, place]
    config = default_config()
    config.name = preset
    config.model.update(
        path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        num_frames=frames,
        height=height,
        width=width,
        max_sequence_length=512,
        attention=attention,
        remat="full",
    )
    config.lora.update(rank=32, alpha=64.0)
    config.prompts.update(
        path="generated",
        sources=("general", "ocr"),
        embedding_cache="~/.cache/marble_jax/embeddings",
    )
    config.rewards.update(path="hub", train=rewards, heldout=heldout, frames="count:3")
    config.rollout.update(
        prompts_per_step=prompts,
        images_per_prompt=images,
        batch_size=batch,
        num_steps=10,
        guidance_scale=4.5,
    )
    config.training.update(micro_batch_size=micro_batch, timestep_fraction=0.4, learning_rate=1e-4)
    config.harmonize.update(mode="amortized", chunk_size=chunk)
    config.evaluation.update(num_steps=25, solver="unipc")
    config.mesh.fsdp = fsdp
    if objective in POLICY_GRADIENTS:
        config.harmonize.mode = "exact"
        config.update_from_flattened_dict(dict(POLICY_GRADIENTS[objective]) | ON_CLIPS[objective])
    if preset.endswith("_marble"):
        config.update_from_flattened_dict(dict(HARMONIZED))
    return config
