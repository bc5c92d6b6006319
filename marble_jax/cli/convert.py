"""`marble-jax convert --model=DIR|HUB_ID|FILE --out=DIR`: published checkpoints to our layout and back."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from marble_jax.cli.options import split
from marble_jax.errors import InputError

OPTIONS = {
    "model": "",
    "out": "",
    "to": "",
    "dtype": "keep",
    "components": "",
    "companion": "",
    "revision": "",
    "shard": "10GB",
    "ignore": "",
    "check": "",
}
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def help_text() -> str:
    return """usage: marble-jax convert --model=MODEL --out=DIR [--to=orbax|diffusers] [--dtype=keep]
       marble-jax convert --check=DIR

  --model=MODEL       a diffusers directory, a directory this verb made, an original single file such as
                      sd3.5_medium.safetensors, a hub id (owner/model, owner/model/file.safetensors), or 'embedded'
  --out=DIR           the result; must not exist. It appears when it is complete: a kill leaves nothing behind but
                      .DIR.partial, and the same command goes on from the last complete component
  --to=LAYOUT         orbax (ours; --config.model.path takes it) or diffusers; default: the other one
  --dtype=keep        keep (bit for bit), float32, bfloat16 or float16
  --components=A,B    transformer, vae, text_encoder, text_encoder_2, text_encoder_3; default: all there are
  --companion=DIR     directory or hub id for the parts a single file lacks (tokenizers, text encoders)
  --revision=NAME     branch, tag or commit of a hub id
  --shard=10GB        largest safetensors file
  --ignore=A,B        patterns of tensors to pass over
  --check=DIR         compares every file with DIR/manifest.json (sizes and SHA-256)

  Gated weights (stabilityai/...): accept the licence on the model's page and log in with `hf auth login` first.
  Training needs no conversion: --config.model.path takes a diffusers directory as it is."""


def run(argv: Sequence[str]) -> int:
    values, rest = split(argv, OPTIONS)
    if rest:
        raise InputError(f"convert: expected no --config; received {rest[0]}")
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # files to files: no accelerator is to be claimed for it
    from marble_jax.console import Console

    console = Console()
    if values["check"]:
        from marble_jax.storage.manifest import check_hashes, read_manifest

        root = Path(values["check"])
        with console.bar(
            sum(r["bytes"] for r in read_manifest(root).values()), "check", "B"
        ) as bar:
            size = check_hashes(root, bar.update)
        console.say(
            f"{root}: {len(read_manifest(root))} files, {size / 1e9:.3f} GB, as in its manifest"
        )
        return 0
    for name in ("model", "out"):
        if not values[name]:
            raise InputError(f"--{name}: expected a value; received none")
    from marble_jax.convert.model import convert
    from marble_jax.programs.build import EMBEDDED, place_of

    model = str(place_of(EMBEDDED, "pipeline")) if values["model"] == EMBEDDED else values["model"]
    convert(
        model,
        values["out"],
        layout=values["to"],
        dtype=values["dtype"],
        components=_list(values["components"]),
        companion=values["companion"],
        revision=values["revision"] or None,
        shard_bytes=_bytes(values["shard"]),
        ignore=_list(values["ignore"]),
        console=console,
    )
    return 0


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kb|mb|gb|)", text.lower())
    if not match or float(match[1]) <= 0:
        raise InputError(f"--shard: expected a size such as 500MB or 10GB; received {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
