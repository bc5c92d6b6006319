"""Trains the embedded video base model by flow matching: Wan transformer and UMT5, jointly, end to end.

    python tools/embedded/video_base.py --vae BUILD/vae --out BUILD/pipeline

The clips are drawn and encoded once (`--clips`), every clip keeps its prompt; the learning rate warms up, stays, and
falls. A checkpoint every 250 steps lets the run be continued with the same command.
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
from data_parallel import launch, share_gradients
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel
from video_autoencoder import as_input, moments

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


def tokenise(tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    found = tokenizer(
        prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    return found.input_ids, found.attention_mask


def dataset(vae: AutoencoderKLWan, tokenizer, count: int, cache: Path, seed: int) -> dict:
    """`count` clips as normalised latents [count, 16, 3, 6, 6] with token ids and mask, cached on disk."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    start, latents, prompts = time.time(), [], []
    rng = random.Random(seed)
    mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    for _ in range(count // 20):
        drawn = [video_world.draw(rng) for _ in range(20)]
        prompts += [prompt for prompt, _, _ in drawn]
        clips = np.stack([video_world.render(make(rng)) for _, _, make in drawn])
        with torch.no_grad():
            z = moments(vae, as_input(clips))[:, : len(mean)]
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
    parser.add_argument("--seconds", type=float, default=1500, help="training, all calls together")
    parser.add_argument("--batch", type=int, default=32, help="clips of a process")
    parser.add_argument("--clips", type=int, default=4000, help="of a process")
    parser.add_argument("--shift", type=float, default=2.0, help="flow_shift of the scheduler")
    launch(train, parser.parse_args())


def train(rank: int, args: argparse.Namespace) -> None:
    """Trains in one of the processes, on clips of its own; the first one writes."""
    args.out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKLWan.from_pretrained(args.vae).eval()
    folder = args.out / ("tokenizer" if rank == 0 else f"tokenizer_of_{rank}")
    tokenizer = vocabulary.write_t5(folder, video_world.words(), video_world.LETTERS, LENGTH)
    data = dataset(vae, tokenizer, args.clips, args.out / f"latents_{rank}.pt", 23 + rank)
    empty = tokenise(tokenizer, [""])
    torch.manual_seed(0)
    nets = torch.nn.ModuleList([build_transformer(), build_text(len(tokenizer))])
    average = copy.deepcopy(nets)
    optimiser = torch.optim.AdamW(
        nets.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(1 + rank)
    step, spent, checkpoint = 0, 0.0, args.out / "training.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        nets.load_state_dict(saved["nets"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.manual_seed(saved["step"] + rank)
        step, spent = saved["step"], saved["spent"]
    if rank == 0:
        sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
        print("parameters of transformer and text encoder", sizes, flush=True)
    begin, total, share = time.time() - spent, 0.0, spent / args.seconds
    while share < 1:
        # Warm-up, constant, then linear to zero over the last 40 %.
        rate = 1.5e-3 * min(1.0, (step + 1) / 100, max(0.0, 1 - share) / 0.4)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = flow_loss(nets, data, empty, args.batch, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # All processes go by one clock.
        elapsed = (time.time() - begin) / args.seconds
        share, mean_loss = share_gradients(nets.parameters(), elapsed, loss.item())
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimiser.step()
        step, total = step + 1, total + mean_loss
        if rank:
            continue
        decay = min(0.997, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), 1 - decay)
        if step % 50 == 0:
            print(f"{step} loss {total / 50:.4f} {time.time() - begin:.0f}s", flush=True)
            total = 0.0
        if step % 250 == 0 or share >= 1:
            state = {
                "nets": nets.state_dict(),
                "average": average.state_dict(),
                "step": step,
                "spent": time.time() - begin,
                "optimiser": optimiser.state_dict(),
            }
            torch.save(state, checkpoint)
            write(average, vae, tokenizer, args)


def write(nets: torch.nn.ModuleList, vae, tokenizer, args: argparse.Namespace) -> None:
    """Writes the pipeline as diffusers has it."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=args.shift
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=nets[1],
        vae=vae,
        transformer=nets[0],
        scheduler=scheduler,
    ).save_pretrained(str(args.out / "diffusers"))


def flow_loss(nets, data: dict, empty: tuple, batch: int, generator) -> torch.Tensor:
    """Flow matching's loss on a random batch, of which a few have no prompt."""
    model, text = nets
    index = torch.randint(len(data["latents"]), (batch,), generator=generator)
    x0 = data["latents"][index].float()
    drop = torch.rand(batch, generator=generator) < 0.05
    ids = torch.where(drop[:, None], empty[0], data["ids"][index])
    mask = torch.where(drop[:, None], empty[1], data["mask"][index])
    sigma = torch.sigmoid(torch.randn(batch, generator=generator) + 0.4)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma[:, None, None, None, None]
    xt = (1 - s) * x0 + s * noise
    velocity = model(xt, sigma * 1000, embed(text, ids, mask), return_dict=False)[0]
    return F.mse_loss(velocity, noise - x0)


if __name__ == "__main__":
    main()
