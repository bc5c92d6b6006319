"""`marble-jax convert --model=DIR|HUB_ID|FILE --out=DIR`: published checkpoints to our layout and back."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from marble_jax.cli.kinds import Place, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError

VERB = Verb(
    about="Published checkpoints to this project's layout and back. Training needs no conversion: --config.model.path "
    "takes a diffusers directory as it is.",
    usage=(
        "--model=MODEL --out=DIR [--to=orbax|diffusers|original] [--dtype=keep]",
        "--check=DIR",
    ),
    options=(
        Option(
            "model",
            "a diffusers directory, a directory this verb made, an original single file such as "
            "sd3.5_medium.safetensors, an original folder (of Wan), a hub id (owner/model, "
            "owner/model/file.safetensors), or 'embedded'",
            Place(),
            "MODEL",
            aliases=("pretrained_model_name_or_path",),
        ),
        Option(
            "out",
            "the result; must not exist. It appears when it is complete: a kill leaves nothing behind but "
            ".DIR.partial, and the same command goes on from the last complete component",
            Place(),
            "DIR",
            aliases=("output_dir",),
        ),
        Option(
            "to",
            "orbax (ours; --config.model.path takes it), diffusers, or original (Wan's own repository's folder, "
            "with pickles); by default the other one of the first two",
            shown="LAYOUT",
        ),
        Option(
            "dtype",
            "keep (bit for bit), float32, bfloat16 or float16",
            default="keep",
            aliases=("torch_dtype",),
        ),
        Option(
            "components",
            "component folders, such as transformer,vae,text_encoder; all there are unless given",
            Words(),
            "A,B",
        ),
        Option(
            "companion",
            "directory or hub id for the parts a single file lacks (tokenizers, text encoders)",
            Place(),
            "DIR",
        ),
        Option("revision", "branch, tag or commit of a hub id", shown="NAME"),
        Option("shard", "largest safetensors file", default="10GB"),
        Option("ignore", "patterns of tensors to pass over", Words(), "A,B"),
        Option(
            "check",
            "compares every file with DIR/manifest.json (sizes and SHA-256)",
            Place(),
            "DIR",
        ),
    ),
    notes="Gated weights (stabilityai/...): accept the licence on the model's page and log in with `hf auth login` "
    "first.",
)
# Bytes of a unit as disks are sold: powers of ten.
_MOST_BYTES = 10**18
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, a model that cannot be converted, or files unlike their manifest.
    """
    # From files to files: no accelerator is to be claimed for it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.check:
        _check_files(Path(options.check))
        return 0
    for name in ("model", "out"):
        if not getattr(options, name):
            raise InputError(f"--{name}: expected a value; received none")
    _convert(options)
    return 0


def _convert(options: argparse.Namespace) -> None:
    from marble_jax.console import Console
    from marble_jax.convert.model import convert
    from marble_jax.families.registry import families
    from marble_jax.programs.locations import resolve_path

    convert(
        str(resolve_path(options.model, "pipeline")),
        options.out,
        [family.formats for family in families()],
        layout=options.to,
        dtype=options.dtype,
        components=options.components,
        companion=options.companion,
        revision=options.revision or None,
        shard_bytes=_bytes(options.shard),
        ignore=options.ignore,
        console=Console(),
    )


def _check_files(root: Path) -> None:
    """Prints that every file of a folder is as in its manifest.

    Raises:
      InputError: one is not.
    """
    from marble_jax.console import Console
    from marble_jax.storage.manifest import check_hashes, read_manifest

    console = Console()
    files = read_manifest(root)
    size = sum(record["bytes"] for record in files.values())
    with console.bar(size, "check", "B") as bar:
        check_hashes(root, bar.update)
    console.say(f"{root}: {len(files)} files, {size / 1e9:.3f} GB, as in its manifest")


def _bytes(text: str) -> int:
    """Bytes of a size such as `10GB`; a number without a unit is bytes.

    Raises:
      InputError: no such size, or none at all.
    """
    from marble_jax.validation import short

    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(kb|mb|gb|)", text.lower())
    if not match or not 0 < float(match[1]) * _UNITS[match[2]] <= _MOST_BYTES:
        raise InputError(f"--shard: expected a size such as 500MB or 10GB; received {short(text)}")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))
