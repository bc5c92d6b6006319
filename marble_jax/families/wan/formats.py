"""Wan's names and layouts in files, as one `FileFormats`."""

from __future__ import annotations

from marble_jax.families.wan.index import check_index
from marble_jax.families.wan.layouts import CARRIED, CLASSES, COMPONENTS, STEMS, layout
from marble_jax.families.wan.lora_names import LORA_NAMES
from marble_jax.families.wan.original import ORIGINAL_FOLDER, SINGLE_FILE
from marble_jax.weights.formats import FileFormats

WAN_FORMATS = FileFormats(
    name="Wan",
    article="a",
    pipeline="WanPipeline",
    diffusers_version="0.33.0",
    components=COMPONENTS,
    carried=CARRIED,
    stems=STEMS,
    classes=CLASSES,
    adapted="transformer",
    layout=layout,
    lora=LORA_NAMES,
    single_file=SINGLE_FILE,
    original_folder=ORIGINAL_FOLDER,
    check_index=check_index,
)
