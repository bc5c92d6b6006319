"""Where the published reward models are: their entries for the registry, and their files on disk or on the Hub.

    pickscore    yuvalkirstain/PickScore_v1               tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    hpsv2        xswu/HPSv2 (HPS_v2.1_compressed.pt)      tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    clipscore    openai/clip-vit-large-patch14
    aesthetic    openai/clip-vit-large-patch14            sac+logos+ava1-l14-linearMSE.pth from GitHub
    imagereward  THUDM/ImageReward                        tokenizer of google-bert/bert-base-uncased
    ocr          RapidOCR, whose package brings its models
    geneval      facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14

A model is looked for in the rewards directory, as `owner/model`, as `model` and as the reward's own name, and fetched
from the Hub (into its cache) where it is in none of these.

Source: `reward_ckpt_path.py` of NVlabs/DiffusionNFT and the scorers that read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marble_jax.errors import InputError
from marble_jax.storage.files import local_path
from marble_jax.weights.hub import HUB_NAME, download

HUB = "hub"
"""What `rewards.path` is when there is no directory and everything comes from the Hub."""
_LAION_H, _OPENAI_L = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
ENTRIES: dict[str, dict[str, Any]] = {
    "pickscore": {
        "kind": "clip",
        "formula": "pickscore",
        "model": "yuvalkirstain/PickScore_v1",
        "tokenizer": _LAION_H,
    },
    "hpsv2": {"kind": "clip", "formula": "hpsv2", "model": "xswu/HPSv2", "tokenizer": _LAION_H},
    "clipscore": {"kind": "clip", "formula": "clipscore", "model": _OPENAI_L},
    "aesthetic": {"kind": "aesthetic", "model": _OPENAI_L, "head": HEAD},
    "imagereward": {
        "kind": "imagereward",
        "model": "THUDM/ImageReward",
        "tokenizer": "google-bert/bert-base-uncased",
    },
    "ocr": {"kind": "ocr", "engine": "rapidocr", "processes": True},
    "geneval": {
        "kind": "geneval",
        "detector": "mask2former",
        "model": "facebook/mask2former-swin-small-coco-instance",
        "clip": _OPENAI_L,
    },
    "jpeg_compressibility": {"kind": "jpeg_compressibility"},
    "jpeg_incompressibility": {"kind": "jpeg_incompressibility"},
    "brightness": {"kind": "brightness"},
    "colourfulness": {"kind": "colourfulness"},
}
"""What a name means where no rewards.json says otherwise."""
CLIP_ENTRIES: dict[str, dict[str, Any]] = {
    "motion": {"kind": "motion"},
    "motion_as_told": {"kind": "motion_as_told"},
    "smoothness": {"kind": "smoothness"},
    "flicker": {"kind": "flicker"},
    "feature_consistency": {"kind": "feature_consistency", "model": _OPENAI_L},
    "video_ocr": {"kind": "video_ocr", "engine": "rapidocr", "processes": True},
    "block_dynamic_degree": {"kind": "block_dynamic_degree"},
    "block_motion_smoothness": {"kind": "block_motion_smoothness"},
}
"""The same for rewards of clips: known by name, but not among what is scored where no names are given, as most of them
refuse images."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
)
FILES: dict[str, tuple[str, ...]] = {
    "clip": ("config.json", "open_clip_config.json", *_TOKENIZER),
    "hpsv2": ("HPS_v2.1_compressed.pt",),
    "tokenizer": _TOKENIZER,
    "imagereward": ("ImageReward.pt", "med_config.json"),
    "mask2former": ("config.json", "model.safetensors"),
}
"""Files of each kind of model that are fetched; the weights of "clip" are chosen by `_download`."""
SOURCES = {HEAD: "https://github.com/christophschuhmann/improved-aesthetic-predictor"}
"""Where to get by hand what is not on the Hub."""
_CLIP_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("open_clip_model.safetensors",),
    ("open_clip_pytorch_model.bin",),
    ("pytorch_model.bin",),
)
"""A repository may hold the same weights in all of these; the first that is there is enough."""


def find_folder(reward: str, directory: Path | None, name: str, kind: str) -> Path:
    """Returns the local folder of a model.

    Args:
      reward: key of the reward, which may be the folder's name.
      directory: the rewards directory, if there is one.
      name: as the entry has it: a folder of the directory, a path, or a Hub name.
      kind: key of FILES.

    Raises:
      InputError: it is nowhere, or the Hub refuses; the message says where it was looked for.
    """
    # What lies in the directory wins over the Hub: a run without network needs no other setting.
    places = _places(reward, directory, name, kind)
    for path in places:
        if path.is_dir():
            return path
    where = " nor ".join(map(str, dict.fromkeys(places)))
    if not HUB_NAME.fullmatch(name):
        raise InputError(
            f"reward {reward}: expected the folder {name}; received none: it is not in {where}"
        )
    try:
        return _download(name, kind)
    except InputError as error:
        raise InputError(
            f"reward {reward}: expected {name} in {where}, or from the Hub; {error} (its files are at "
            f"https://huggingface.co/{name})"
        ) from error


def _places(reward: str, directory: Path | None, name: str, kind: str) -> list[Path]:
    """Returns where a folder may lie, in the order in which it is looked for."""
    if directory is None:
        return [local_path(name)]
    places = [directory / local_path(name), directory / Path(name).name]
    # A folder under the reward's name holds its model, never the tokenizer of another.
    if kind != "tokenizer" and HUB_NAME.fullmatch(name):
        places.append(directory / reward)
    return places


def _download(name: str, kind: str) -> Path:
    local = download(name, FILES[kind])
    if kind != "clip":
        return local
    # One format after the other: a pattern for all of them would fetch the same weights up to four times.
    for patterns in _CLIP_WEIGHTS:
        local = download(name, patterns)
        for pattern in patterns:
            if any(local.glob(pattern)):
                return local
    return local


def find_file(reward: str, directory: Path | None, name: str) -> Path:
    """Returns the local path of a file of the rewards directory.

    Raises:
      InputError: it is not there; the message says where to get it.
    """
    path, where = Path(name), "in a directory that rewards.path names"
    if directory is not None:
        path, where = directory / name, f"in {directory}"
    if path.is_file():
        return path
    hint = ""
    if name in SOURCES:
        hint = f" (get it from {SOURCES[name]} and put it there)"
    raise InputError(f"reward {reward}: expected the file {name} {where}; received none{hint}")
