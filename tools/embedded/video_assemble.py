"""Puts the trained video pipeline into the package, with its rewards, which need no trained weights.

    python tools/embedded/video_assemble.py --base BUILD/pipeline --out marble_jax/embedded/video

The networks are stored in half precision and compute in single: what is stored is what every reader gets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import video_world
from assemble import halve

REWARDS = {
    "motion": {"kind": "motion_as_told", **video_world.SPEEDS},
    "smoothness": {"kind": "smoothness"},
    "ocr": {"kind": "video_ocr", "detect": False, "scale": 4},
    "geneval": {"kind": "geneval", "detector": "shapes", "frames": "count:3"},
    "colourfulness": {"kind": "colourfulness", "frames": "count:3"},
    "compressibility": {"kind": "jpeg_compressibility", "frames": "count:3"},
    "flicker": {"kind": "flicker"},
    "block_dynamic_degree": {"kind": "block_dynamic_degree"},
    "block_motion_smoothness": {"kind": "block_motion_smoothness"},
}
HALF = ("transformer", "vae", "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipeline, rewards = args.out / "pipeline", args.out / "rewards"
    shutil.rmtree(pipeline, ignore_errors=True)
    shutil.copytree(args.base / "diffusers", pipeline)
    for component in HALF:
        for file in (pipeline / component).glob("*.safetensors"):
            halve(file)
    for config in pipeline.rglob("*.json"):
        text = json.loads(config.read_text())
        if isinstance(text, dict) and str(text.get("_name_or_path", "")).startswith("/"):
            del text["_name_or_path"]
            config.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    rewards.mkdir(parents=True, exist_ok=True)
    (rewards / "rewards.json").write_text(json.dumps(REWARDS, indent=1) + "\n")
    total = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{total / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
