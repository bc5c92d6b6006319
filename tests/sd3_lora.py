"""Adapters of SD3's transformer: `marble_jax.trainable.lora` with the layers' names and targets of that family."""

from __future__ import annotations

from marble_jax.families.sd3.family import FAMILY
from marble_jax.trainable import lora
from marble_jax.trainable.lora import merge, num_parameters

__all__ = [
    "ATTENTION_TARGETS",
    "LoraSpec",
    "init_adapter",
    "merge",
    "num_parameters",
    "stack",
    "target_layers",
    "unstack",
]

ATTENTION_TARGETS = FAMILY.default_targets


def LoraSpec(rank=32, alpha=64.0, targets=ATTENTION_TARGETS):
    return lora.LoraSpec(rank, alpha, targets)


def target_layers(shapes, targets=ATTENTION_TARGETS):
    return lora.target_layers(FAMILY.layers_at, shapes, targets)


def init_adapter(key, shapes, spec):
    return lora.init_adapter(key, FAMILY.layers_at, shapes, spec)


def unstack(adapter):
    return lora.unstack(FAMILY.layers_at, adapter)


def stack(pairs, shapes):
    return lora.stack(FAMILY.layers_at, pairs, shapes)
