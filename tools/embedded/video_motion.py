"""Says how much of a motion an autoencoder of video keeps: clips of the world, encoded and decoded, by told speed.

    python tools/embedded/video_motion.py --vae marble_jax/embedded/video/pipeline/vae --clips 240

A row a speed: PSNR of the clips that come back; the reward `motion_as_told` of the clips that went in and of those that
came back, in [-1, 1], mean and its difference; and the mean absolute difference of neighbouring frames, in [0, 1].
"""

from __future__ import annotations

import argparse
import random

import numpy as np
import torch
import video_world
from diffusers import AutoencoderKLWan
from video_autoencoder import as_input

from marble_jax.rewards.video.motion_as_told import MotionAsTold, MotionOptions

BATCH = 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vae", required=True, help="folder of an AutoencoderKLWan")
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    drawn = [video_world.draw(rng, "test") for _ in range(args.clips)]
    clips = np.stack([video_world.render(make(rng)) for _, _, make in drawn])
    vae = AutoencoderKLWan.from_pretrained(args.vae).eval()
    again = np.concatenate(
        [reconstructed(vae, clips[start : start + BATCH]) for start in range(0, len(clips), BATCH)]
    )
    before = clips.astype(np.float32) / 255
    told = [metadata for _, metadata, _ in drawn]
    scores = [agreement(told, frames) for frames in (before, again)]
    print(
        "told     clips    PSNR   motion_as_told before   after   difference   frame change before   after"
    )
    for speed in ("", *video_world.SPEEDS):
        chosen = np.array([metadata.get("speed", "") == speed for metadata in told])
        error = np.mean((before[chosen] - again[chosen]) ** 2)
        first, second = (values[chosen].mean() for values in scores)
        changes = [np.abs(np.diff(frames[chosen], axis=1)).mean() for frames in (before, again)]
        print(
            f"{speed or video_world.STILL:8} {chosen.sum():5} {-10 * np.log10(error):7.1f} {first:23.3f} {second:7.3f} "
            f"{second - first:+12.3f} {changes[0]:21.4f} {changes[1]:7.4f}"
        )


def reconstructed(vae: AutoencoderKLWan, clips: np.ndarray) -> np.ndarray:
    """Clips uint8 [N, F, H, W, 3] encoded and decoded: float32 in [0, 1], from the mean of the latents."""
    with torch.no_grad():
        latents = vae.encode(as_input(clips)).latent_dist.mode()
        decoded = vae.decode(latents).sample
    return (decoded.permute(0, 2, 3, 4, 1).numpy() / 2 + 0.5).clip(0, 1)


def agreement(told: list[dict], frames: np.ndarray) -> np.ndarray:
    """The reward of every clip."""
    options = MotionOptions(**{name: video_world.SPEEDS[name] for name in ("slow", "fast")})
    reward = MotionAsTold("motion", options)
    scores, _ = reward.score({}, frames, [metadata["prompt"] for metadata in told], told)
    return np.asarray(scores)


if __name__ == "__main__":
    main()
