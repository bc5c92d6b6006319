"""Where a LoRA's matrices lie, and how strong they are: PEFT's configuration beside or inside the file.

The scale of a @ b is alpha / rank of `adapter_config.json`, or of the same fields in the header of a diffusers file.
Files without either are left to `lora`: their tensors say it, or nothing does.

Source: PEFT 0.21 (`LoraConfig`, `get_pattern_key`), diffusers 0.42 for the header.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Le

from marble_jax.convert.lora_keys import PEFT_PREFIX
from marble_jax.errors import InputError
from marble_jax.storage.files import local_path, read_json
from marble_jax.validation import parse_json_object, short, validated_fields
from marble_jax.weights.formats import FileFormats
from marble_jax.weights.hub import HUB_NAME, cache_hint, download
from marble_jax.weights.safetensors_files import SafetensorsFile

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PICKLE = "adapter_model.bin"
"""What older versions of PEFT wrote in place of `PEFT_FILE`."""
HEADER_CONFIG = "lora_adapter_metadata"
"""Where diffusers (new versions only) keeps the LoraConfig in the header of its file."""

_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    # Kinds that compute something else with the same matrices, or from another base model.
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "layer_replication": (None, []),
}
"""Values of a plain LoRA's fields, the usual one first; PEFT's versions differ in which fields they write."""
_PLAIN_STARTS = (None, True, False, "", "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights as they are. Others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) move a part of
them into the adapter, so that the file alone is not what was trained."""
MOST_STRENGTH = 1000.0
"""Of alpha / rank and of a weight; the largest in use are about a hundred."""
_MOST_PATTERNS, _MOST_CHARACTERS, _MOST_QUANTIFIERS = 4096, 256, 4
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_UNBOUNDED = re.compile(r"\(\?(?!:)|\\[1-9]")
_QUANTIFIER = re.compile(r"(?<!\\)(?<!\()[*+?{]")
_FIELDS: dict[str, Any] = {
    "r": Annotated[int, Ge(0), Le(1 << 20)],
    "lora_alpha": float,
    "use_rslora": bool | None,
    "rank_pattern": dict[str, Annotated[int, Ge(1)]] | None,
    "alpha_pattern": dict[str, float] | None,
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A PEFT `LoraConfig` of a plain LoRA.

    Attributes:
      path: where it was read, for messages.
      fields: its fields.
    """

    path: pathlib.Path
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises InputError for what is more than a plain LoRA."""
        for field, plain in _PLAIN.items():
            received = self.fields.get(field)
            if received not in plain:
                raise InputError(
                    f"{self.path}: {field}: expected {plain[0]!r}, a plain LoRA; received {received!r}"
                )
        start = self.fields.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            raise InputError(
                f"{self.path}: init_lora_weights: expected a LoRA that leaves the base weights as they are; "
                f"received {start!r}"
            )
        for field in ("r", "lora_alpha"):
            if field not in self.fields:
                raise InputError(f"{self.path}: {field}: expected a number; received none")
        validated_fields(_FIELDS, self.fields, self.path)
        for field in ("rank_pattern", "alpha_pattern"):
            _check_patterns(f"{self.path}: {field}", self.fields.get(field) or {})

    def strength(self, name: str, rank: int) -> tuple[float, float]:
        """(alpha, scale of a @ b) of the layer `name`. Raises InputError unless its rank is the stated one."""
        stated = self._value("rank_pattern", name, self.fields["r"])
        if stated != rank:
            raise InputError(
                f"{self.path}: rank of {name}: expected {stated:g}, as written there; received tensors of "
                f"rank {rank}"
            )
        alpha = self._value("alpha_pattern", name, self.fields["lora_alpha"])
        check_strength(f"{self.path}: alpha of {name} over its rank {rank}", alpha / rank)
        # rsLoRA divides by the root of the rank. Source: Kalajdzievski 2023 (arXiv 2312.03732).
        if self.fields.get("use_rslora"):
            return alpha, alpha / math.sqrt(rank)
        return alpha, alpha / rank

    def _value(self, field: str, name: str, default: Any) -> float:
        """The value of the first pattern of `field` that the end of a layer's name matches, or the default."""
        value = default
        for pattern, patterned in (self.fields.get(field) or {}).items():
            # The first one that matches counts, as in PEFT's `get_pattern_key`.
            if self._matches(field, pattern, name):
                value = patterned
                break
        return float(value)

    def _matches(self, field: str, pattern: str, name: str) -> bool:
        """Whether a pattern of `field` matches a layer's name, or the end of it after a dot."""
        try:
            return re.match(rf"(.*\.)?({pattern})$", name) is not None
        except re.error as error:
            raise InputError(
                f"{self.path}: {field}: expected names or patterns; received {pattern!r}"
            ) from error


def check_strength(what: str, strength: float) -> None:
    """Raises InputError for a strength that no LoRA has; `what` names it."""
    if not abs(strength) <= MOST_STRENGTH:
        raise InputError(
            f"{what}: expected a strength of at most {MOST_STRENGTH:g}; received {strength:g}"
        )


def _check_patterns(what: str, patterns: Mapping[str, Any]) -> None:
    """Raises InputError for patterns that could take for ever to match; they come with the file.

    A repeated group, a backward reference or many repetitions in a row is what makes a pattern take exponential time.
    """
    if len(patterns) > _MOST_PATTERNS:
        raise InputError(
            f"{what}: expected at most {_MOST_PATTERNS} patterns; received {len(patterns)}"
        )
    for pattern in patterns:
        count = len(_QUANTIFIER.findall(pattern))
        dangerous = _REPEATED_GROUP.search(pattern) or _UNBOUNDED.search(pattern)
        if dangerous or count > _MOST_QUANTIFIERS or len(pattern) > _MOST_CHARACTERS:
            raise InputError(
                f"{what}: expected names, or patterns without repeated groups and with at most "
                f"{_MOST_QUANTIFIERS} repetitions; received {short(pattern)}"
            )


def find_lora(path: pathlib.Path) -> tuple[pathlib.Path, LoraConfig | None]:
    """The weights file that a path or Hub name stands for, and PEFT's configuration where there is one.

    Raises:
      InputError: no such file; several that could be meant; a configuration of more than a plain LoRA.
    """
    # As a configuration file writes it.
    path = local_path(path)
    if path.is_file():
        return _lora_file(path)
    if not path.exists() and HUB_NAME.fullmatch(str(path)):
        # Not every .safetensors: a repository of a whole model would come down to the last gigabyte.
        patterns = [PEFT_CONFIG, PEFT_FILE, DIFFUSERS_FILE, "lora/adapter_*", "*lora*.safetensors"]
        path = download(str(path), patterns)
    if not path.is_dir():
        raise InputError(
            f"LoRA: expected a directory, a .safetensors file or a hub id; received {str(path)!r}"
        )
    return _lora_in(path)


def _lora_in(folder: pathlib.Path) -> tuple[pathlib.Path, LoraConfig | None]:
    """The weights file of a directory, and PEFT's configuration where there is one."""
    # PEFT's pair before diffusers' file, as it alone always says alpha; an export of ours has both.
    if (folder / PEFT_CONFIG).is_file():
        return _peft_pair(folder)
    if (folder / DIFFUSERS_FILE).is_file():
        return folder / DIFFUSERS_FILE, None
    # Where upstream's training keeps PEFT's pair.
    inner = folder / "lora"
    if (inner / PEFT_CONFIG).is_file():
        return _peft_pair(inner)
    return _lora_file(_only_file(folder))


def _peft_pair(folder: pathlib.Path) -> tuple[pathlib.Path, LoraConfig]:
    """PEFT's weights with their configuration."""
    config = _read_config(folder / PEFT_CONFIG)
    if not (folder / PEFT_FILE).is_file() and (folder / PEFT_PICKLE).is_file():
        raise InputError(
            f"{folder}: expected {PEFT_FILE}; received {PEFT_PICKLE}, a pickle (load it with PEFT and save "
            "it again: save_pretrained(..., safe_serialization=True))"
        )
    return folder / PEFT_FILE, config


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    """The one safetensors file of a directory, whatever it is called."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    names = sorted(entry.name for entry in folder.iterdir())
    received = ", ".join(names[:6]) or "an empty directory"
    # PEFT saves an adapter that has a name into a folder of that name.
    named = sorted(path.parent.name for path in folder.glob(f"*/{PEFT_CONFIG}"))
    hint = cache_hint(folder)
    if named:
        hint = f" (its adapters are in subfolders: pass {', '.join(f'{folder / name}' for name in named[:3])})"
    elif PEFT_PICKLE in names:
        hint = (
            f" ({PEFT_PICKLE} is a pickle: re-save it as safetensors, with {PEFT_CONFIG} beside it)"
        )
    raise InputError(
        f"{folder}: expected {PEFT_CONFIG} with {PEFT_FILE}, {DIFFUSERS_FILE} or one other .safetensors "
        f"file; received {received}{hint}"
    )


def _lora_file(path: pathlib.Path) -> tuple[pathlib.Path, LoraConfig | None]:
    """A file of a LoRA, with PEFT's configuration if it is PEFT's file and that lies beside it."""
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path}: expected a .safetensors file (others can run code); received {path.name!r}"
        )
    beside = path.parent / PEFT_CONFIG
    if path.name == PEFT_FILE and beside.is_file():
        return path, _read_config(beside)
    return path, None


def _read_config(path: pathlib.Path) -> LoraConfig:
    return LoraConfig(path, read_json(path))


def header_config(source: SafetensorsFile, formats: FileFormats) -> LoraConfig | None:
    """The LoraConfig in the header of a diffusers file; None where there is none.

    Raises:
      InputError: it is not a JSON object, or not a plain LoRA's; or a PEFT file came without its configuration.
    """
    text = source.metadata.get(HEADER_CONFIG)
    if text is None:
        _check_not_peft(source)
        return None
    fields = parse_json_object(text, f"{source.path}: {HEADER_CONFIG} in the file's header")
    # diffusers writes the fields of each component's LoRA under that component's prefix.
    return LoraConfig(source.path, _under(formats.lora.diffusers_prefix, fields))


def _check_not_peft(source: SafetensorsFile) -> None:
    """Raises InputError for a file of PEFT's, which means nothing without its configuration."""
    if any(key.startswith(PEFT_PREFIX) for key in source.keys()):
        raise InputError(
            f"{source.path}: expected {PEFT_CONFIG} beside a PEFT file, as alpha, and so the strength, is "
            "written there; received none"
        )


def _under(prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields whose names have a prefix, without it."""
    return {key.removeprefix(prefix): fields[key] for key in fields if key.startswith(prefix)}


def finite_number(value: Any) -> float | None:
    """A finite number, also in text, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(number):
        return None
    return number
