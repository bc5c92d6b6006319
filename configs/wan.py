"""Wan2.1-T2V-1.3B: LoRA of rank 32 on its attention, MARBLE in amortized mode, on pictures or on clips.

    marble-jax train --config=wan:240p_8x80gb --workdir=runs/wan

`picture` draws 480 x 832 px, `240p` clips of 17 frames of 240 x 416, `480p` clips of 33 frames of 480 x 832. Rollouts
take 10 dpm2 steps with guidance 4.5, without which the base model blurs; four of the ten noise levels are trained on,
as a step's time is nearly all in the network. Rewards of images see three frames of a clip, OCR reads the first, middle
and last one, and `motion` keeps clips from freezing; smoothness, flicker and a dynamic degree are only evaluated. The
prompts are the ready-made sets. `picture` also evaluates aesthetics, whose head has to be fetched by hand (`marble-jax
help rewards`). Not run by this project yet: a run takes large accelerators. `model.path` is a
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
| 480p_8x80gb    | --devices=8 --chip=h100   | 17.8 of 64.4  | 24 x 24        | 538      |
| 480p_v5p_16    | --devices=16 --chip=v5p   | 18.4 of 102.8 | 24 x 24        | 580      |
| 480p_v6e_16    | --devices=16 --chip=v6e   | 11.1 of 33.5  | 24 x 24        | 290      |

`flow_grpo`, `flow_grpo_fast`, `grpo_guard` and `awm` train clips of 33 frames of 240 x 416 on eight GPUs of 80 GB with
other objectives and one advantage of the sum of scores, and with `_marble` behind the name on every reward's own
gradient. Flow-GRPO's are its published settings for this model but for the sizes (groups of 4 there): 20 steps,
guidance 4.5 in rollouts and training, clip 1e-3, divergence 0.004, learning rate 1e-4, advantages over the standard
deviation of their group; Fast and GRPO-Guard keep their constants of SD3.5-medium in 20 steps, as advantage-weighted
matching does in 14: none are published for Wan. Guidance is that of Flow-GRPO for all of them. Fast is published
without any, and has been seen to collapse with 4.5 on SD3.5-medium (issues 182 and 224 of yifan123/flow_grpo).
Matching trains the velocity under the prompt alone, so that guided clips are not its own policy's, as they should be
where nothing weighs them by a ratio. `--config.rollout.guidance_scale=1` is what both ask for, and the base model blurs
then.

For 240p_v6e_16 the TPU compiler (`marble-jax plan --config=wan:240p_v6e_16 --topology=v6e:4x4 --roofline
--programs=rollout,decode,solving`, libtpu 0.0.52) gives the rollout 4.13 GB a chip, by source 4.72, with an MFU of 57 %
at most; the decoder 2.98 GB, by source 2.01, as its channels fill 128 lanes; and the step with every reward's gradient
8.43 GB, by source 9.03, 11.5 s at least, an MFU of 58 % at most (63 % in a micro-batch without anchors,
`--programs=micro`).

At 480p the weights are split over all devices but on the single GPU (`mesh.fsdp`); elsewhere every device holds them.
On GPUs all 30 blocks are compiled one by one (`model.unroll`), as a loop would stack arrays and cut them out again.
That takes longer to compile, once, and where weights are split they may all be whole at a time, which the table counts.
What else it does to memory no compiler has been asked.
"""

import dataclasses

from marble_jax.config import HARMONIZED, POLICY_GRADIENTS, default_config
from marble_jax.errors import one_of

IMAGE_REWARDS = ("pickscore", "hpsv2", "clipscore")


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is drawn, and which rewards look at it."""

    num_frames: int
    height: int
    width: int
    train: tuple[str, ...] = (*IMAGE_REWARDS, "video_ocr", "motion")
    heldout: tuple[str, ...] = ("smoothness", "flicker", "block_dynamic_degree")


@dataclasses.dataclass(frozen=True)
class Place:
    """What a machine draws in a step, and how much of it at once; `chunk` is of one device, the rest of all of them."""

    attention: str
    prompts: int
    images: int
    rollout_batch: int
    micro_batch: int
    chunk: int
    fsdp: int = 1

    @property
    def unroll(self) -> int:
        """Blocks that are compiled one by one: all 30 on GPUs, whose loops copy; one a turn on TPUs, whose do not."""
        return 30 if self.attention == "cudnn" else 1


SAMPLES = {
    "picture": Samples(
        1, 480, 832, train=(*IMAGE_REWARDS, "ocr"), heldout=("aesthetic", "imagereward")
    ),
    "240p": Samples(17, 240, 416),
    "240p_33": Samples(33, 240, 416),
    "480p": Samples(33, 480, 832),
}
PLACES = {
    ("picture", "80gb"): Place("cudnn", 24, 12, 48, 24, 8),
    ("picture", "8x80gb"): Place("cudnn", 48, 24, 384, 192, 8),
    ("picture", "v5p_16"): Place("splash", 48, 24, 576, 192, 4),
    ("picture", "v6e_16"): Place("splash", 48, 24, 576, 64, 2),
    ("240p", "80gb"): Place("cudnn", 24, 12, 48, 24, 8),
    ("240p", "8x80gb"): Place("cudnn", 48, 24, 384, 192, 8),
    ("240p", "v5p_16"): Place("splash", 48, 24, 576, 192, 4),
    ("240p", "v6e_16"): Place("splash", 48, 24, 192, 64, 2),
    ("240p_33", "8x80gb"): Place("cudnn", 48, 24, 192, 96, 4),
    ("480p", "80gb"): Place("cudnn", 12, 12, 8, 4, 2),
    ("480p", "8x80gb"): Place("cudnn", 24, 24, 64, 32, 2, fsdp=8),
    ("480p", "v5p_16"): Place("splash", 24, 24, 64, 64, 2, fsdp=16),
    ("480p", "v6e_16"): Place("splash", 24, 24, 32, 16, 1, fsdp=16),
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


@dataclasses.dataclass(frozen=True)
class Preset:
    """Keys of SAMPLES and PLACES, and of ON_CLIPS unless DiffusionNFT trains, then on every reward or on their sum."""

    samples: str
    place: str = "8x80gb"
    objective: str = ""
    every_reward: bool = True


PRESETS = {
    "picture": Preset("picture"),
    "240p": Preset("240p"),
    "480p": Preset("480p"),
    "picture_80gb": Preset("picture", "80gb"),
    "picture_8x80gb": Preset("picture"),
    "picture_v5p_16": Preset("picture", "v5p_16"),
    "picture_v6e_16": Preset("picture", "v6e_16"),
    "240p_80gb": Preset("240p", "80gb"),
    "240p_8x80gb": Preset("240p"),
    "240p_v5p_16": Preset("240p", "v5p_16"),
    "240p_v6e_16": Preset("240p", "v6e_16"),
    "480p_80gb": Preset("480p", "80gb"),
    "480p_8x80gb": Preset("480p"),
    "480p_v5p_16": Preset("480p", "v5p_16"),
    "480p_v6e_16": Preset("480p", "v6e_16"),
    "flow_grpo": Preset("240p_33", objective="flow_grpo", every_reward=False),
    "flow_grpo_marble": Preset("240p_33", objective="flow_grpo"),
    "flow_grpo_fast": Preset("240p_33", objective="flow_grpo_fast", every_reward=False),
    "flow_grpo_fast_marble": Preset("240p_33", objective="flow_grpo_fast"),
    "grpo_guard": Preset("240p_33", objective="grpo_guard", every_reward=False),
    "grpo_guard_marble": Preset("240p_33", objective="grpo_guard"),
    "awm": Preset("240p_33", objective="awm", every_reward=False),
    "awm_marble": Preset("240p_33", objective="awm"),
}
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


def get_config(preset: str = "picture"):
    one_of("preset of wan", preset, PRESETS)
    chosen = PRESETS[preset]
    samples, place = SAMPLES[chosen.samples], PLACES[chosen.samples, chosen.place]
    config = default_config()
    config.name = preset
    config.model.update(
        path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        num_frames=samples.num_frames,
        height=samples.height,
        width=samples.width,
        max_sequence_length=512,
        attention=place.attention,
        remat="full",
        unroll=place.unroll,
    )
    config.lora.update(rank=32, alpha=64.0)
    config.prompts.update(
        path="generated",
        sources=("general", "ocr"),
        embedding_cache="auto",
    )
    config.rewards.update(
        path="hub", train=samples.train, heldout=samples.heldout, frames="count:3"
    )
    config.rollout.update(
        prompts_per_step=place.prompts,
        images_per_prompt=place.images,
        batch_size=place.rollout_batch,
        num_steps=10,
        guidance_scale=4.5,
    )
    config.training.update(
        micro_batch_size=place.micro_batch, timestep_fraction=0.4, learning_rate=1e-4
    )
    config.harmonize.update(mode="amortized", chunk_size=place.chunk)
    config.evaluation.update(num_steps=25, solver="unipc")
    config.mesh.fsdp = place.fsdp
    if chosen.objective:
        config.harmonize.mode = "exact"
        config.update_from_flattened_dict(
            dict(POLICY_GRADIENTS[chosen.objective]) | ON_CLIPS[chosen.objective]
        )
    if chosen.objective and chosen.every_reward:
        config.update_from_flattened_dict(dict(HARMONIZED))
    return config
