"""SD3's names and layouts in files, as one `FileFormats`."""

from __future__ import annotations

from marble_jax.families.sd3.layouts import CARRIED, CLASSES, COMPONENTS, STEMS, layout
from marble_jax.families.sd3.lora_names import LORA_NAMES
from marble_jax.families.sd3.original import SINGLE_FILE
from marble_jax.weights.formats import FileFormats

SD3_FORMATS = FileFormats(
    name="SD3",
    article="an",
    pipeline="StableDiffusion3Pipeline",
    diffusers_version="0.30.0",
    components=COMPONENTS,
    carried=CARRIED,
    stems=STEMS,
    classes=CLASSES,
    adapted="transformer",
    layout=layout,
    lora=LORA_NAMES,
    single_file=SINGLE_FILE,
)
