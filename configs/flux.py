"""FLUX.1."""

from marble_jax.config import default_config
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
# (attention, mesh.fsdp, prompts x images a step, rollout batch, micro-batch, chunk a device)
PLACES = {
    "80gb": ("cudnn", 1, (24, 12), 16, 12, 4),
    "8x80gb": ("cudnn", 1, (48, 24), 384, 96, 4),
    "v5p_16": ("splash", 1, (48, 24), 576, 192, 4),
    "v6e_16": ("splash", 16, (48, 24), 576, 64, 2),
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
)


def get_config(preset: str = PRESETS[0]):
    one_of("preset of configs/flux.py", preset, PRESETS)
    model = next(name for name in MODELS if preset.startswith(name))
    place = preset.removeprefix(model).removeprefix("_") or "8x80gb"
    attention, fsdp, (prompts, images), batch, micro_batch, chunk = PLACES[place]
    config = default_config()
    config.name = preset
    config.lora.update(rank=64, alpha=128.0)
    config.prompts.path = "generated"
    config.prompts.embedding_cache = "~/.cache/marble_jax/embeddings"
    config.rewards.path = "hub"
    config.harmonize.update(mode="amortized", chunk_size=chunk)
    config.mesh.fsdp = fsdp
    config.model.update(attention=attention, remat="full")
    config.rollout.update(prompts_per_step=prompts, images_per_prompt=images, batch_size=batch)
    config.training.micro_batch_size = micro_batch
    config.update_from_flattened_dict(MODELS[model])
    return config
