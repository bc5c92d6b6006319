"""File formats of the registered families, which the conversion of checkpoints tries in turn."""

from __future__ import annotations

from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.weights.formats import FileFormats


def registered_formats() -> tuple[FileFormats, ...]:
    """Formats of every family."""
    return (SD3_FORMATS,)
