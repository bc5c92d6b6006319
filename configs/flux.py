"""FLUX.1 at 512 px: LoRA of rank 64 on attention, MARBLE in amortized mode, on one machine or a slice of TPUs.

    marble-jax train --config=flux:flux1_dev_8x80gb --workdir=runs/flux

FLUX.1-dev takes the guidance scale 3.5 as an input, in training as in sampling; FLUX.1-schnell takes none. Rollouts are
short: 10 dpm2 steps (6 timesteps trained on) for dev with 512 tokens of T5, 4 Euler steps (all trained on) for schnell
with 256. Rewards, balancing and prompts are those of configs/sd3.py. Not run by this project yet: a run takes large
accelerators. `model.path` is a diffusers directory or hub id; dev is gated (log in first).

`flux1_dev` and `flux1_schnell` are for eight GPUs of 80 GB. `marble-jax plan --config=flux:PRESET` with the
options below says, in GB of the largest program and what lies beside it on a device (the reward models take some 12 GB
more) and seconds of a step at 40 % of the peak, rewards apart:

| preset               | options of plan           | GB of usable  | images a step | s a step |
|----------------------|---------------------------|---------------|---------------|----------|
| flux1_dev_80gb       | --devices=1 --chip=h100   | 47.8 of 64.4  | 24 x 12       | 562      |
| flux1_dev_8x80gb     | --devices=8 --chip=h100   | 48.2 of 64.4  | 48 x 24       | 281      |
| flux1_dev_v5p_16     | --devices=16 --chip=v5p   | 49.7 of 102.8 | 48 x 24       | 303      |
| flux1_dev_v6e_16     | --devices=16 --chip=v6e   | 18.9 of 33.5  | 48 x 24       | 151      |
| flux1_schnell_80gb   | --devices=1 --chip=h100   | 46.8 of 64.4  | 24 x 12       | 274      |
| flux1_schnell_8x80gb | --devices=8 --chip=h100   | 47.0 of 64.4  | 48 x 24       | 137      |
| flux1_schnell_v5p_16 | --devices=16 --chip=v5p   | 48.3 of 102.8 | 48 x 24       | 147      |
| flux1_schnell_v6e_16 | --devices=16 --chip=v6e   | 18.4 of 33.5  | 48 x 24       | 74       |

`flux1_dev_flow_grpo`, `_flow_grpo_fast`, `_grpo_guard` and `_awm` train dev on eight GPUs of 80 GB with other
objectives and one advantage of the sum of scores, and with `_marble` behind the name on every reward's own gradient.
Flow-GRPO's are its published settings for FLUX.1-dev: 6 steps, noise 0.9 (Fast 0.8), no divergence, LoRA on attention
and feed-forward. GRPO-Guard has its constants of SD3.5-medium. So does advantage-weighted matching but for the weight
of the divergence from the base model, 0.4, which its author names for FLUX.1 on GenEval and OCR (0.01 on PickScore) in
issue 4 of scxue/advantage_weighted_matching.

On GPUs 19 blocks are compiled one by one (`model.unroll`): all of the first kind, and half of the 38 of the second in a
turn of their loop. That takes longer to compile, once; what it does to memory no compiler has been asked, and the table
is reckoned without it.

On v6e-16 the weights are split over all chips (`mesh.fsdp=16`); elsewhere every device holds the 23.8 GB. The TPU
compiler (`--topology=v6e:4x4`, libtpu 0.0.52) gave the rollout of flux1_dev_v6e_16 10.74 GB a chip, by source 10.57.
"""

from marble_jax.config import HARMONIZED, POLICY_GRADIENTS, default_config
from marble_jax.errors import one_of

MODELS = {
    "flux1_dev": {
        "model.path": "black-forest-labs/FLUX.1-dev",
        "model.embedded_guidance": 3.5,
        "model.max_sequence_length": 512,
        "rollout.num_steps": 10,
        "training.timestep_fraction": 0.6,
        "evaluation.num_steps": 28,
    },
    "flux1_schnell": {
        "model.path": "black-forest-labs/FLUX.1-schnell",
        "model.max_sequence_length": 256,
        "rollout.num_steps": 4,
        "rollout.solver": "euler",
        "training.timestep_fraction": 1.0,
        "evaluation.num_steps": 4,
        "evaluation.solver": "euler",
    },
}
# Where it runs: (attention, unroll, mesh.fsdp, prompts x images a step, rollout batch, micro-batch, chunk a device)
PLACES = {
    "80gb": ("cudnn", 19, 1, (24, 12), 16, 12, 4),
    "8x80gb": ("cudnn", 19, 1, (48, 24), 384, 96, 4),
    "v5p_16": ("splash", 1, 1, (48, 24), 576, 192, 4),
    "v6e_16": ("splash", 1, 16, (48, 24), 576, 64, 1),
}
# What Flow-GRPO publishes for FLUX.1-dev where it is not what it publishes for SD3.5-medium.
SHORT = {
    "rollout.num_steps": 6,
    "rollout.guidance_scale": 1.0,
    "training.timestep_fraction": 1.0,
    "policy_gradient.kl_weight": 0.0,
    # The adapter is three times as large as that of attention alone.
    "harmonize.chunk_size": 2,
    "lora.targets": (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
}
ON_FLUX = {
    "flow_grpo": SHORT | {"rollout.noise_level": 0.9},
    "flow_grpo_fast": SHORT,
    "grpo_guard": SHORT | {"rollout.noise_level": 0.9},
    "awm": {"awm.kl_weight": 0.4},
}
PRESETS = (
    "flux1_dev",
    "flux1_schnell",
    "flux1_dev_80gb",
    "flux1_dev_8x80gb",
    "flux1_dev_v5p_16",
    "flux1_dev_v6e_16",
    "flux1_schnell_80gb",
    "flux1_schnell_8x80gb",
    "flux1_schnell_v5p_16",
    "flux1_schnell_v6e_16",
    "flux1_dev_flow_grpo",
    "flux1_dev_flow_grpo_marble",
    "flux1_dev_flow_grpo_fast",
    "flux1_dev_flow_grpo_fast_marble",
    "flux1_dev_grpo_guard",
    "flux1_dev_grpo_guard_marble",
    "flux1_dev_awm",
    "flux1_dev_awm_marble",
)
ABOUT = {
    "flux1_dev": "FLUX.1-dev on eight GPUs of 80 GB",
    "flux1_schnell": "FLUX.1-schnell on eight GPUs of 80 GB",
    "flux1_dev_80gb": "FLUX.1-dev on one GPU of 80 GB, fewer images a step",
    "flux1_dev_8x80gb": "FLUX.1-dev on eight GPUs of 80 GB",
    "flux1_dev_v5p_16": "FLUX.1-dev on 16 chips of TPU v5p",
    "flux1_dev_v6e_16": "FLUX.1-dev on 16 chips of TPU v6e, weights split",
    "flux1_schnell_80gb": "FLUX.1-schnell on one GPU of 80 GB, fewer images a step",
    "flux1_schnell_8x80gb": "FLUX.1-schnell on eight GPUs of 80 GB",
    "flux1_schnell_v5p_16": "FLUX.1-schnell on 16 chips of TPU v5p",
    "flux1_schnell_v6e_16": "FLUX.1-schnell on 16 chips of TPU v6e, weights split",
    "flux1_dev_flow_grpo": "FLUX.1-dev, Flow-GRPO on a sum of scores",
    "flux1_dev_flow_grpo_marble": "FLUX.1-dev, Flow-GRPO with a gradient of every reward",
    "flux1_dev_flow_grpo_fast": "FLUX.1-dev, Flow-GRPO-Fast on a sum of scores",
    "flux1_dev_flow_grpo_fast_marble": "FLUX.1-dev, Flow-GRPO-Fast with a gradient of every reward",
    "flux1_dev_grpo_guard": "FLUX.1-dev, GRPO-Guard on a sum of scores",
    "flux1_dev_grpo_guard_marble": "FLUX.1-dev, GRPO-Guard with a gradient of every reward",
    "flux1_dev_awm": "FLUX.1-dev, advantage-weighted matching on a sum of scores",
    "flux1_dev_awm_marble": "FLUX.1-dev, advantage-weighted matching with a gradient of every reward",
}


def get_config(preset: str = PRESETS[0]):
    one_of("preset of flux", preset, PRESETS)
    model = next(name for name in MODELS if preset.startswith(name))
    rest = preset.removeprefix(model).removeprefix("_")
    objective = rest.removesuffix("_marble")
    place = rest if rest in PLACES else "8x80gb"
    attention, unroll, fsdp, (prompts, images), batch, micro_batch, chunk = PLACES[place]
    config = default_config()
    config.name = preset
    config.lora.update(rank=64, alpha=128.0)
    config.prompts.path = "generated"
    config.prompts.embedding_cache = "auto"
    config.rewards.path = "hub"
    config.harmonize.update(mode="amortized", chunk_size=chunk)
    config.mesh.fsdp = fsdp
    config.model.update(attention=attention, remat="full", unroll=unroll)
    config.rollout.update(prompts_per_step=prompts, images_per_prompt=images, batch_size=batch)
    config.training.micro_batch_size = micro_batch
    config.update_from_flattened_dict(MODELS[model])
    if objective in POLICY_GRADIENTS:
        config.harmonize.mode = "exact"
        config.update_from_flattened_dict(dict(POLICY_GRADIENTS[objective]) | ON_FLUX[objective])
    if rest.endswith("_marble"):
        config.update_from_flattened_dict(dict(HARMONIZED))
    return config
