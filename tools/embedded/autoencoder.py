"""Trains the embedded VAE (diffusers AutoencoderKL, 8x, 16 channels) on fresh images of the world.

python tools/embedded/autoencoder.py --out BUILD/vae
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from world import draw, render


def images(rng: random.Random, count: int) -> torch.Tensor:
    """`count` fresh images, float32 [count, 3, 64, 64] in [-1, 1]."""
    batch = np.stack([render(draw(rng)[2](rng)) for _ in range(count)])
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


def build() -> AutoencoderKL:
    blocks = (16, 32, 64, 64)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=blocks,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(11)
    vae = build()
    print("parameters", sum(p.numel() for p in vae.parameters()))
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, args.steps, pct_start=0.05)
    start = time.time()
    for step in range(args.steps):
        x = images(rng, args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
        # The decoder sees slightly disturbed latents: a flow model's samples are never exactly on the encoder's.
        z = posterior.sample().float()
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        loss = (
            F.l1_loss(y, x)
            + 0.5 * F.mse_loss(y, x)
            + 0.5 * edges
            + 2e-4 * posterior.kl().mean() / 1024
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"{step} loss {loss.item():.4f} mse {F.mse_loss(y, x).item():.5f} z-std {z.std().item():.3f} "
                f"{time.time() - start:.0f}s",
                flush=True,
            )
    with torch.no_grad():
        z = torch.cat([vae.encode(images(rng, 64)).latent_dist.mean for _ in range(8)])
    vae.register_to_config(
        scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4)
    )
    print(
        "scaling",
        vae.config.scaling_factor,
        "shift",
        vae.config.shift_factor,
        "per-channel std",
        z.std((0, 2, 3)),
    )
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
