"""Trains the embedded video base model by flow matching: Wan transformer and UMT5, jointly, end to end.

    python tools/embedded/video_base.py --vae BUILD/vae --out BUILD/pipeline

The clips are drawn and encoded once (`--clips`), every clip keeps its prompt; the learning rate warms up, stays, and
falls. A checkpoint every 1000 steps lets the run be continued with the same command.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import video_world
import vocabulary
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel
from video_autoencoder import as_input

LENGTH = 16
"""Rows of text that the transformer sees, those of zeros beyond a prompt's end counted in."""
WIDTH = 128


def build_text(vocabulary_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        dropout_rate=0.0,
        relative_attention_max_distance=32,
        relative_attention_num_buckets=16,
    )
    model = UMT5EncoderModel(config)
    # Of two tables that should be one, the trained one and the saved one could differ.
    if model.shared.weight is not model.encoder.embed_tokens.weight:
        model.encoder.embed_tokens = model.shared
    return model


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_layers=5,
        rope_max_seq_len=32,
    )


def rendered(count: int, file: Path) -> tuple[np.ndarray, list[str]]:
    """`count` clips uint8 [count, 5, 48, 48, 3] with their prompts; the clips are kept in `file`."""
    rng = random.Random(23)
    drawn = [video_world.draw(rng) for _ in range(count)]
    prompts = [prompt for prompt, _, _ in drawn]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        scenes = random.Random(24)
        clips = np.stack([video_world.render(make(scenes)) for _, _, make in drawn])
        np.save(file, clips)
    return np.load(file, mmap_mode="r"), prompts


def tokenise(tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    found = tokenizer(
        prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    return found.input_ids, found.attention_mask


def dataset(vae: AutoencoderKLWan, tokenizer, count: int, out: Path) -> dict:
    """`count` clips as normalised latents [count, 16, 3, 6, 6] with token ids and mask, cached on disk."""
    cache = out / "latents.pt"
    if cache.exists():
        return torch.load(cache, weights_only=True)
    clips, prompts = rendered(count, out / "clips.npy")
    start, latents = time.time(), []
    mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    for first in range(0, count, 50):
        with torch.no_grad():
            z = vae.encode(as_input(clips[first : first + 50])).latent_dist.mean
        latents.append(((z - mean) / std).half())
    ids, mask = tokenise(tokenizer, prompts)
    data = {"latents": torch.cat(latents), "ids": ids, "mask": mask}
    torch.save(data, cache)
    print(f"{count} clips encoded in {time.time() - start:.0f}s", flush=True)
    return data


def embed(text: UMT5EncoderModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Text embeddings [N, LENGTH, WIDTH] as WanPipeline has them: zeros beyond a prompt's end."""
    return text(ids, attention_mask=mask).last_hidden_state * mask[:, :, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=1800, help="training time, all calls together"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument(
        "--shift", type=float, default=2.0, help="flow_shift of the shipped scheduler"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_pretrained(args.vae).eval()
    tokenizer = vocabulary.write_t5(
        args.out / "tokenizer", video_world.words(), video_world.LETTERS, LENGTH
    )
    data = dataset(vae, tokenizer, args.clips, args.out)
    empty_ids, empty_mask = tokenise(tokenizer, [""])
    nets = torch.nn.ModuleList([build_transformer(), build_text(len(tokenizer))])
    average = copy.deepcopy(nets)
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
    print("parameters: transformer and text", sizes, flush=True)
    optimiser = torch.optim.AdamW(
        nets.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(1)
    step, spent, checkpoint = 0, 0.0, args.out / "training.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        nets.load_state_dict(saved["nets"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"])
        step, spent = saved["step"], saved["spent"]
    begin, total = time.time() - spent, 0.0
    share = 0.0
    while share < 1:
        share = (time.time() - begin) / args.seconds
        # Warm-up, constant, then linear to zero over the last 40 %.
        rate = 1.5e-3 * min(1.0, (step + 1) / 200, max(0.0, 1 - share) / 0.4)
        for group in optimiser.param_groups:
            group["lr"] = rate
        total += train_step(nets, data, (empty_ids, empty_mask), args.batch, optimiser, generator)
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), 1 - decay)
        step += 1
        if step % 100 == 0:
            print(f"{step} loss {total / 100:.4f} {time.time() - begin:.0f}s", flush=True)
            total = 0.0
        if step % 1000 == 0 or share >= 1:
            torch.save(
                {
                    "nets": nets.state_dict(),
                    "average": average.state_dict(),
                    "step": step,
                    "spent": time.time() - begin,
                    "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(),
                },
                checkpoint,
            )
            WanPipeline(
                tokenizer=tokenizer,
                text_encoder=average[1],
                vae=vae,
                transformer=average[0],
                scheduler=UniPCMultistepScheduler(
                    prediction_type="flow_prediction",
                    use_flow_sigmas=True,
                    flow_shift=args.shift,
                ),
            ).save_pretrained(str(args.out / "diffusers"))


def train_step(nets, data: dict, empty: tuple, batch: int, optimiser, generator) -> float:
    """One step of flow matching on a random batch; returns its loss."""
    model, text = nets
    index = torch.randint(len(data["latents"]), (batch,), generator=generator)
    x0 = data["latents"][index].float()
    drop = torch.rand(batch, generator=generator) < 0.05
    ids = torch.where(drop[:, None], empty[0], data["ids"][index])
    mask = torch.where(drop[:, None], empty[1], data["mask"][index])
    sigma = torch.sigmoid(torch.randn(batch, generator=generator) + 0.4)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma[:, None, None, None, None]
    velocity = model(
        (1 - s) * x0 + s * noise, sigma * 1000, embed(text, ids, mask), return_dict=False
    )[0]
    loss = F.mse_loss(velocity, noise - x0)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
    optimiser.step()
    return loss.item()


if __name__ == "__main__":
    main()
