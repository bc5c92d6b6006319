"""Where the published reward models are: their entries for the catalogue, and their files on disk or on the Hub.

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
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "preprocessor_config.json",
)
FILES: dict[str, tuple[str, ...]] = {
    "clip": ("config.json", "open_clip_config.json", *_TOKENIZER),
    "hpsv2": ("HPS_v2.1_compressed.pt",),
    "tokenizer": _TOKENIZER,
    "imagereward": ("ImageReward.pt", "med_config.json"),
    "mask2former": ("config.json", "model.safetensors"),
}
"""Files of each kind of model that are fetched; the weights of "clip" are chosen by `_clip_weights`."""
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
    """The local folder of a model.

    Args:
      reward: key of the reward, which may be the folder's name.
      directory: the rewards directory, if there is one.
      name: as the entry has it: a folder of the directory, a path, or a Hub name.
      kind: key of FILES.

    Raises:
      InputError: it is nowhere, or the Hub refuses; the message says where it was looked for.
    """
    tried = [Path(name)] if directory is None else [directory / name, directory / Path(name).name]
    if directory is not None and kind != "tokenizer" and HUB_NAME.fullmatch(name):
        tried.append(directory / reward)
    for path in tried:
        if path.is_dir():
            return path
    where = " nor ".join(map(str, dict.fromkeys(tried)))
    if not HUB_NAME.fullmatch(name):
        raise InputError(
            f"reward {reward}: expected the folder {name}; received none: it is not in {where}"
        )
    try:
        local = download(name, FILES[kind])
        return _clip_weights(name, local) if kind == "clip" else local
    except InputError as error:
        raise InputError(
            f"reward {reward}: expected {name} in {where}, or from the Hub; {error} (its files are at "
            f"https://huggingface.co/{name})"
        ) from error


def find_file(reward: str, directory: Path | None, name: str) -> Path:
    """The local path of a file of the rewards directory.

    Raises:
      InputError: it is not there; the message says where to get it.
    """
    path = Path(name) if directory is None else directory / name
    if path.is_file():
        return path
    hint = f" (get it from {SOURCES[name]} and put it there)" if name in SOURCES else ""
    where = f"in {directory}" if directory is not None else "in a directory that rewards.path names"
    raise InputError(f"reward {reward}: expected the file {name} {where}; received none{hint}")


def _clip_weights(name: str, local: Path) -> Path:
    for patterns in _CLIP_WEIGHTS:
        local = download(name, patterns)
        if any(list(local.glob(pattern)) for pattern in patterns):
            return local
    return local
