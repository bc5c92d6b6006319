"""FLUX.1's names and layouts in files, as one `FileFormats`."""

from __future__ import annotations

from marble_jax.families.flux1.layouts import CARRIED, CLASSES, COMPONENTS, STEMS, layout
from marble_jax.families.flux1.lora_names import LORA_NAMES
from marble_jax.families.flux1.original import SINGLE_FILE
from marble_jax.weights.formats import FileFormats

FLUX1_FORMATS = FileFormats(
    name="FLUX.1",
    article="a",
    pipeline="FluxPipeline",
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
