"""Trains the embedded video autoencoder (diffusers AutoencoderKLWan, 8x in space, 2x in time) on fresh clips.

    python tools/embedded/video_autoencoder.py --out BUILD/vae

Only the coarsest level looks at more than one frame: elsewhere the earlier taps of the causal kernels are zero and stay
so, which lets a clip be trained as images with two-dimensional convolutions, several times faster on CPUs. What is
written is an ordinary AutoencoderKLWan, whose streamed decoding is compared with the functions here at the end.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
import video_world
from data_parallel import launch, share_gradients
from diffusers import AutoencoderKLWan
from torch import nn

CHANNELS = 16
IMAGE_SHARE = 0.5
"""Of the training time, in which single frames are trained on."""
POOL = 3000
"""Clips that batches are drawn from; some are new at every step."""


def build(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 6],
        num_res_blocks=1,
        temperal_downsample=[False, False, True],
        latents_mean=mean or [0.0] * CHANNELS,
        latents_std=std or [1.0] * CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
    )


def plain_conv(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """A causal convolution whose earlier taps are zero, of frames [M, C, H, W]."""
    pad = conv.kernel_size[1] // 2
    # Twice as fast as with channels first where there are few of them.
    weight = conv.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, conv.bias, padding=pad)


def causal_conv(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """A causal convolution of clips [N, C, F, H, W]."""
    if x.shape[2] > 1:
        return conv(x)
    # A single frame has zeros before it, which the earlier taps would be spent on.
    return plain_conv(conv, x[:, :, 0].contiguous(memory_format=torch.channels_last))[:, :, None]


def norm(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gamma = layer.gamma.reshape(-1, *[1] * (x.ndim - 2))
    return F.normalize(x, dim=1) * layer.scale * gamma


def residual(block: nn.Module, x: torch.Tensor, conv=plain_conv) -> torch.Tensor:
    h = x if isinstance(block.conv_shortcut, nn.Identity) else conv(block.conv_shortcut, x)
    x = conv(block.conv1, F.silu(norm(block.norm1, x)))
    return conv(block.conv2, F.silu(norm(block.norm2, x))) + h


def middle(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = residual(block.resnets[0], x, causal_conv)
    return residual(block.resnets[1], block.attentions[0](x), causal_conv)


def frames_of(x: torch.Tensor) -> torch.Tensor:
    """Clips [N, C, F, H, W] as frames [N F, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def clips_of(x: torch.Tensor, count: int) -> torch.Tensor:
    """Frames [N F, C, H, W] as clips [N, C, F, H, W]."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def moments(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance [N, 2 C, f, h, w] of clips [N, 3, F, H, W] in [-1, 1]."""
    encoder = vae.encoder
    x = plain_conv(encoder.conv_in, frames_of(clips))
    for block in encoder.down_blocks[:-1]:
        x = block.resample(x) if hasattr(block, "resample") else residual(block, x)
    x = clips_of(x, len(clips))
    # The first frame has a latent frame of its own; each later one is made of two and the one before.
    if x.shape[2] > 1:
        halves = time_conv(encoder)
        later = F.conv3d(x, halves.weight, halves.bias, stride=(2, 1, 1))
        x = torch.cat([x[:, :, :1], later], 2)
    x = residual(encoder.down_blocks[-1], x, causal_conv)
    x = F.silu(norm(encoder.norm_out, middle(encoder.mid_block, x)))
    return vae.quant_conv(causal_conv(encoder.conv_out, x))


def decoded(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """Clips [N, 3, F, H, W], not clipped, of latents [N, C, f, h, w]."""
    decoder = vae.decoder
    x = middle(decoder.mid_block, causal_conv(decoder.conv_in, vae.post_quant_conv(z)))
    first, *later_blocks = decoder.up_blocks
    for block in first.resnets:
        x = residual(block, x, causal_conv)
    upsampler = first.upsamplers[0]
    if x.shape[2] > 1:
        # Two frames of each latent frame but the first, which the others do not see here.
        pair = upsampler.time_conv(x[:, :, 1:])
        pair = pair.unflatten(1, (2, -1))
        later = torch.stack([pair[:, 0], pair[:, 1]], 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], 2)
    count = len(x)
    x = upsampler.resample(frames_of(x))
    for up_block in later_blocks:
        for block in up_block.resnets:
            x = residual(block, x)
        if up_block.upsamplers is not None:
            x = up_block.upsamplers[0].resample(x)
    x = plain_conv(decoder.conv_out, F.silu(norm(decoder.norm_out, x)))
    return clips_of(x, count)


def time_conv(encoder: nn.Module) -> nn.Conv3d:
    """The convolution that halves frames."""
    (layer,) = [block.time_conv for block in encoder.down_blocks if hasattr(block, "time_conv")]
    return layer


def prepare(vae: AutoencoderKLWan) -> None:
    """Sets the earlier taps to zero where a clip is treated as images, and starts with latents of little noise."""
    coarse = [vae.encoder.down_blocks[-1], vae.encoder.mid_block, vae.encoder.conv_out]
    coarse += [vae.decoder.conv_in, vae.decoder.mid_block, vae.decoder.up_blocks[0]]
    keep = {id(m) for part in coarse for m in part.modules()} | {id(time_conv(vae.encoder))}
    with torch.no_grad():
        for module in (vae.encoder, vae.decoder):
            for layer in module.modules():
                if isinstance(layer, nn.Conv3d) and id(layer) not in keep:
                    layer.weight[:, :, :-1] = 0
        vae.quant_conv.bias[CHANNELS:] = -5.0
        # Off the residual branches the signal keeps its size: it would shrink by sqrt(3) at each of a dozen layers, and
        # the decoder would long see next to nothing of the latents.
        for name, layer in vae.named_modules():
            in_branch = name.endswith(("conv1", "conv2", "to_qkv", "proj"))
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and not in_branch:
                layer.weight *= 3**0.5


def new_clips(rng: random.Random, count: int) -> np.ndarray:
    """Fresh clips uint8 [count, 5, 48, 48, 3]."""
    return np.stack([video_world.render(video_world.draw(rng)[2](rng)) for _ in range(count)])


def as_input(clips: np.ndarray) -> torch.Tensor:
    """Clips uint8 [N, F, H, W, 3] as [N, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def difference(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean absolute and squared error, and that of edges in space and over time."""
    edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (3, 4))
    loss = F.l1_loss(y, x) + 2.0 * F.mse_loss(y, x) + 0.5 * edges
    if x.shape[2] > 1:
        loss = loss + 0.5 * F.l1_loss(y.diff(dim=2), x.diff(dim=2))
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=1500, help="training time")
    parser.add_argument("--batch", type=int, default=4, help="clips of a process")
    parser.add_argument("--learning_rate", type=float, default=2.5e-3)
    parser.add_argument(
        "--first", default="", help="an autoencoder to go on from, with clips alone"
    )
    launch(train, parser.parse_args())


def train(rank: int, args: argparse.Namespace) -> None:
    """Trains in one of the processes; the first one writes."""
    torch.manual_seed(0)
    vae = build()
    prepare(vae)
    image_share = IMAGE_SHARE
    if args.first:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(args.first).state_dict())
        image_share = 0.0
    seed = rank + (100 if args.first else 0)
    torch.manual_seed(seed)
    rng = random.Random(11 + seed)
    pool = new_clips(rng, POOL // 20)
    optimiser = torch.optim.AdamW(
        vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
    )
    start, step, share = time.time(), 0, 0.0
    while share < 1:
        # Warm-up, then a cosine to nearly nothing.
        rate = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * min(share, 1.0)))
        for group in optimiser.param_groups:
            group["lr"] = args.learning_rate * max(rate, 0.005)
        fresh = new_clips(rng, 1)
        if len(pool) < POOL // 2:
            pool = np.concatenate([pool, fresh])
        else:
            pool[rng.randrange(len(pool))] = fresh[0]
        if share < image_share:
            # Images first: as many different ones for less time.
            chosen = rng.sample(range(len(pool)), 4 * args.batch)
            moments_in_time = rng.choices(range(video_world.NUM_FRAMES), k=len(chosen))
            x = as_input(pool[np.array(chosen), np.array(moments_in_time)][:, None])
        else:
            x = as_input(pool[np.array(rng.sample(range(len(pool)), args.batch))])
        mean, logvar = moments(vae, x).chunk(2, 1)
        logvar = logvar.clamp(-20, 5)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        # The decoder sees slightly disturbed latents: a flow model's samples are never exactly on the encoder's.
        y = decoded(vae, z + 0.05 * torch.randn_like(z))
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = difference(y, x) + 2e-4 * divergence
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # All processes go by one clock.
        (share,) = share_gradients(vae.parameters(), (time.time() - start) / args.seconds)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if rank == 0 and step % 50 == 0:
            by_frame = ((y - x) ** 2).mean((0, 1, 3, 4)).tolist()
            psnr = " ".join(f"{10 * np.log10(4 / e):.1f}" for e in by_frame)
            print(
                f"{step} loss {loss.item():.4f} psnr by frame {psnr} z-std {z.std().item():.3f} "
                f"{time.time() - start:.0f}s",
                flush=True,
            )
        if rank == 0 and step % 500 == 499:
            finish(vae, rng, args.out)
        step += 1
    if rank == 0:
        finish(vae, rng, args.out)
        compare(vae, as_input(new_clips(rng, 4)))


def finish(vae: AutoencoderKLWan, rng: random.Random, out: str) -> None:
    """Measures the latents and writes the autoencoder with their statistics."""
    with torch.no_grad():
        clips = as_input(new_clips(rng, 128))
        z = moments(vae, clips)[:, :CHANNELS]
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in z.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 4) for v in z.std((0, 2, 3, 4)).tolist()],
    )
    vae.save_pretrained(out)


def compare(vae: AutoencoderKLWan, clips: torch.Tensor) -> None:
    """Says how far diffusers' streamed encoding and decoding are from the functions that were trained."""
    with torch.no_grad():
        z = moments(vae, clips)
        streamed = vae.encode(clips).latent_dist.parameters
        y = decoded(vae, z[:, :CHANNELS]).clamp(-1, 1)
        again = vae.decode(z[:, :CHANNELS]).sample
    print("encoder", (z - streamed).abs().max().item(), "decoder", (y - again).abs().max().item())


if __name__ == "__main__":
    main()
