"""Puts the trained parts together as package data: pipeline in diffusers layout, reward models, `rewards.json`.

    python tools/embedded/assemble.py --base BUILD/pipeline --rewards BUILD/rewards --out marble_jax/embedded

The large parts are stored in half precision and compute in single: what is stored is what every reader gets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

REWARDS = {
    "alignment": {"kind": "clip", "formula": "clipscore", "model": "alignment"},
    "preference": {"kind": "clip", "formula": "pickscore", "model": "preference"},
    "aesthetic": {
        "kind": "aesthetic",
        "model": "preference",
        "head": "aesthetic/model.safetensors",
    },
    "ocr": {"kind": "ocr", "detect": False, "scale": 3},
    "geneval": {"kind": "geneval", "detector": "shapes"},
    "judge": {"kind": "clip", "formula": "clipscore", "model": "judge"},
}
HALF = ("transformer", "vae")


def halve(file: Path) -> None:
    """Rewrites a safetensors file in half precision."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(str(file)).items()}
    save_file(tensors, str(file), {"format": "pt"})
    file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rewards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipeline, rewards = args.out / "pipeline", args.out / "rewards"
    for target, source in ((pipeline, args.base / "diffusers"), (rewards, args.rewards)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    for component in HALF:
        for file in (pipeline / component).glob("*.safetensors"):
            halve(file)
    for config in pipeline.rglob("*.json"):
        text = json.loads(config.read_text())
        if isinstance(text, dict) and str(text.get("_name_or_path", "")).startswith("/"):
            del text["_name_or_path"]
            config.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    (rewards / "rewards.json").write_text(json.dumps(REWARDS, indent=1) + "\n")
    total = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{total / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
