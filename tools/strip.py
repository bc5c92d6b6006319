"""A before/after strip of a run's fixed prompts, as one image.

python tools/strip.py --workdir=runs/first --out=tools/images/embedded.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from marble_jax.storage.images import grid, save_png


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--scale", type=int, default=2, help="whole number by which images are enlarged"
    )
    args = parser.parse_args()
    steps = sorted((args.workdir / "samples").glob("step_*"))
    if len(steps) < 2:
        parser.error(
            f"--workdir: expected images of two or more evaluations; received {len(steps)}"
        )
    rows = [
        [np.asarray(Image.open(p).convert("RGB")) for p in sorted(steps[i].glob("*.png"))]
        for i in (0, -1)
    ]
    strip = grid([p for row in rows for p in row], len(rows[0]))
    save_png(args.out, strip.repeat(args.scale, 0).repeat(args.scale, 1))


if __name__ == "__main__":
    main()
