"""The paper's SD3.5-medium recipe (MARBLE, arXiv 2605.06507), under upstream's preset names.

    marble-jax train --config=sd3:sd3_multi_reward_pareto_5r_alpha_ema --workdir=gs://bucket/run

48 prompts x 24 images a step, 25 dpm2 steps without guidance, 24 timesteps trained on, LoRA rank 32 on the eight
attention projections. The presets under upstream's names are this project's amortized mode with these numbers: it
solves on the whole batch and weighs gradients where the paper solves on a mini-batch and weighs advantages, and leaves
a missing reward out where it counts there as advantage 0. `upstream` is the released code's own step, of which
`marble_jax/training/upstream_step.py` lists what it does otherwise. The paper reports, after training: GenEval 0.94,
OCR 0.96, PickScore 22.83, CLIPScore 0.286, HPSv2.1 0.355, Aesthetic 6.59, ImageReward 1.53. Not run by this project
yet: the weights are gated, and no accelerator was at hand. `model.path` is a diffusers directory or hub id
(log in first). `rewards.path` is a directory with the reward models as published
(`marble_jax/rewards/models/published.py` lists them), 'hub' fetches them. The prompts are the ready-made sets
(`marble-jax prompts --out=DIR` writes them down); `prompts.path=DIR` takes your own, SOURCE/{train,test} files for
general, ocr and geneval. Their text embeddings, 1.7 MB each, are computed once, by several hosts in shares, and kept in
`prompts.embedding_cache`: T5 never meets training.

`flow_grpo`, `flow_grpo_fast`, `grpo_guard` and `awm` train the same model with other objectives, with their papers'
settings and one advantage of the sum of scores; with `_marble` behind the name, every reward has its own gradient.
They compute in bfloat16, in which log-probabilities are coarser than in the float16 of Flow-GRPO's released code: the
ratio in every step's line tells by how much, and `model.dtype=float32` takes it away.

Presets for devices are the exact mode of the same recipe and differ from each other in how much is computed at once and
in nothing that is computed: 48 prompts x 24 images, fused attention. `gpu_80gb` is for one GPU of 80 GB (A100, H100),
`gpu_140gb` for one of 140 GB (H200), `gpu_8x80gb` for eight of 80 GB. Nothing is run again in their backward pass, and
blocks are compiled one by one rather than as a loop, whose arrays would be filled with zeros, written and cut out
again; that takes longer to compile, once. `tpu_v5e`, `tpu_v5p` and `tpu_v6e` are for 16 chips; the loops of a TPU copy
nothing. On v5e and v6e blocks keep their products and attention's output, and run the rest again: by the TPU compiler a
micro-batch takes 11.8 and 11.9 GB a chip and 456 and 128 ms at least, which caps MFU at 70 and 54 %; on v5p, where
nothing is run again, 30.3 GB, 230 ms and 60 %. What they take,
`marble-jax plan --config=sd3:gpu_80gb --devices=1 --chip=h100` says, with --chip=h200, --devices=8, or
--devices=16 --chip=v6e for the others; reward models take some 12 GB more, which `tpu_v5e` has no room for
(`marble-jax reward serve` runs them on another machine). With --topology=h100:1 and --roofline the
compiler says what the least time is; `marble-jax help roofline` has the figures.

`gpu_48gb` (L40S) and `gpu_24gb` (L4, A10G, RTX 4090) are for single smaller cards: fewer images a step, 24 prompts x 12
and 12 x 12, less at once, and more recomputed in the backward pass: all but the products and attention's output on the
larger one, whole blocks on the smaller. Their blocks, too, are compiled one by one. By plan they take 24.1 and 12.4 GB.
`gpu_24gb` has room for one reward model beside that: PickScore, with OCR and GenEval on the host. Others can be served
from another machine.
"""

from marble_jax.config import HARMONIZED, POLICY_GRADIENTS, UPSTREAM, default_config
from marble_jax.errors import one_of

PRESETS = (
    "sd3_multi_reward_pareto_5r_alpha_ema",
    "sd3_ablation_equal_alpha",
    "upstream",
    "exact",
    "weighted_sum",
    "gpu_24gb",
    "gpu_48gb",
    "gpu_80gb",
    "gpu_140gb",
    "gpu_8x80gb",
    "tpu_v5e",
    "tpu_v5p",
    "tpu_v6e",
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
    "sd3_multi_reward_pareto_5r_alpha_ema": "the paper's numbers, amortized: a whole-batch solve every ten steps",
    "sd3_ablation_equal_alpha": "the same with equal alpha and no normalised gradients, missing rewards left out",
    "upstream": "the released code's own step, peculiarities included",
    "exact": "the paper's sizes with a solve at every step",
    "weighted_sum": "the paper's sizes with one advantage of a sum of scores",
    "gpu_24gb": "the exact mode on one GPU of 24 GB (RTX 4090), an eighth of the images, three rewards",
    "gpu_48gb": "the exact mode on one GPU of 48 GB (L40S), a quarter of the images a step",
    "gpu_80gb": "the exact mode on one GPU of 80 GB (A100, H100)",
    "gpu_140gb": "the exact mode on one GPU of 140 GB (H200)",
    "gpu_8x80gb": "the exact mode on eight GPUs of 80 GB",
    "tpu_v5e": "the exact mode on 16 chips of v5e, reward models elsewhere",
    "tpu_v5p": "the exact mode on 16 chips of v5p",
    "tpu_v6e": "the exact mode on 16 chips of v6e",
    "flow_grpo": "Flow-GRPO on a sum of scores, with its paper's settings",
    "flow_grpo_marble": "Flow-GRPO with a gradient of every reward",
    "flow_grpo_fast": "Flow-GRPO-Fast on a sum of scores",
    "flow_grpo_fast_marble": "Flow-GRPO-Fast with a gradient of every reward",
    "grpo_guard": "GRPO-Guard on a sum of scores",
    "grpo_guard_marble": "GRPO-Guard with a gradient of every reward",
    "awm": "advantage-weighted matching on a sum of scores",
    "awm_marble": "advantage-weighted matching with a gradient of every reward",
}
# (attention, remat, unroll, rollout.batch_size, training.micro_batch_size, harmonize.chunk_size a device)
PLACES = {
    "gpu_24gb": ("cudnn", "full", 13, 6, 24, 6),
    "gpu_48gb": ("cudnn", "products", 13, 16, 24, 8),
    "gpu_80gb": ("cudnn", "none", 13, 144, 72, 9),
    "gpu_140gb": ("cudnn", "none", 13, 288, 72, 18),
    "gpu_8x80gb": ("cudnn", "none", 13, 576, 144, 9),
    "tpu_v5e": ("splash", "products", 1, 144, 144, 3),
    "tpu_v5p": ("splash", "none", 1, 144, 144, 9),
    "tpu_v6e": ("splash", "products", 1, 144, 144, 3),
}
SMALL_GPUS = {  # (rollout.prompts_per_step, rollout.images_per_prompt)
    "gpu_48gb": (24, 12),
    "gpu_24gb": (12, 12),
}


def get_config(preset: str = PRESETS[0]):
    one_of("preset of sd3", preset, PRESETS)
    config = default_config()
    config.name = preset
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.model.remat = (
        "full"  # without it the 9 samples a device of the paper take about 100 GB of activations
    )
    # The 9 samples a device of the paper are one chunk.
    config.harmonize.chunk_size = 9
    config.prompts.path = "generated"
    config.prompts.embedding_cache = "auto"
    config.rewards.path = "hub"
    config.harmonize.mode = preset if preset in ("upstream", "exact") else "amortized"
    if preset in PLACES:
        attention, remat, unroll, rollouts, micro_batch, chunk = PLACES[preset]
        config.harmonize.update(mode="exact", chunk_size=chunk)
        config.model.update(attention=attention, remat=remat, unroll=unroll)
        config.rollout.batch_size = rollouts
        config.training.micro_batch_size = micro_batch
    if preset in SMALL_GPUS:
        prompts, images = SMALL_GPUS[preset]
        config.rollout.update(prompts_per_step=prompts, images_per_prompt=images)
    if preset == "gpu_24gb":
        config.rewards.train = ("pickscore", "ocr", "geneval")
    if preset == "sd3_ablation_equal_alpha":
        config.harmonize.update(balancer="equal", normalize=False)
    elif preset == "upstream":
        config.update_from_flattened_dict(dict(UPSTREAM))
        config.harmonize.upstream_ranks = 16
    elif preset == "weighted_sum":
        config.advantages.scalarize = "weighted_sum"
    published = preset.removesuffix("_marble")
    if published in POLICY_GRADIENTS:
        config.harmonize.mode = "exact"
        config.update_from_flattened_dict(dict(POLICY_GRADIENTS[published]))
    if preset.endswith("_marble"):
        config.update_from_flattened_dict(dict(HARMONIZED))
    return config
