"""Trains the embedded base model by flow matching: transformer and three text encoders, jointly, end to end.

    python tools/embedded/base.py --vae BUILD/vae --out BUILD/pipeline --steps 3000

The images are encoded once (`--images`), every image keeps its prompt; steps are warm-up, constant, decay.
A checkpoint every 500 steps lets the run be continued with the same command.
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
import vocabulary
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from world import draw, render


class TextEncoders(torch.nn.Module):
    """The three text encoders with SD3's assembly of their outputs."""

    def __init__(self, clip_vocabulary: int, t5_vocabulary: int, eos: int, pads: tuple[int, int]):
        super().__init__()

        def clip(pad: int) -> CLIPTextModelWithProjection:
            return CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=clip_vocabulary,
                    hidden_size=64,
                    intermediate_size=128,
                    projection_dim=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=vocabulary.CLIP_LENGTH,
                    hidden_act="quick_gelu" if pad == eos else "gelu",
                    bos_token_id=eos - 1,
                    eos_token_id=eos,
                    pad_token_id=pad,
                )
            )

        self.one, self.two = clip(pads[0]), clip(pads[1])
        self.three = T5EncoderModel(
            T5Config(
                vocab_size=t5_vocabulary,
                d_model=128,
                d_kv=32,
                num_heads=4,
                d_ff=256,
                num_layers=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                relative_attention_max_distance=32,
                relative_attention_num_buckets=16,
                is_encoder_decoder=False,
            )
        )

    def forward(self, ids: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        one = self.one(ids[0], output_hidden_states=True)
        two = self.two(ids[1], output_hidden_states=True)
        clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        t5 = self.three(ids[2]).last_hidden_state
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], 1), torch.cat([one.text_embeds, two.text_embeds], -1)


def tokenise(tokenizers: list, prompts: list[str]) -> tuple[torch.Tensor, ...]:
    lengths = (vocabulary.CLIP_LENGTH, vocabulary.CLIP_LENGTH, vocabulary.T5_LENGTH)
    return tuple(
        torch.tensor(t(prompts, padding="max_length", max_length=n, truncation=True).input_ids)
        for t, n in zip(tokenizers, lengths)
    )


def dataset(vae: AutoencoderKL, tokenizers: list, count: int, cache: Path) -> dict:
    """`count` images as scaled latents [count, 16, 8, 8] with their token ids, cached on disk."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    rng = random.Random(23)
    latents, prompts = [], []
    start = time.time()
    for _ in range(count // 250):
        batch = []
        for _ in range(250):
            prompt, _, scene = draw(rng)
            batch.append(render(scene(rng)))
            prompts.append(prompt)
        x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(x.to(memory_format=torch.channels_last)).latent_dist.mean
        latents.append(
            ((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor)
            .half()
            .contiguous()
        )
    data = {"latents": torch.cat(latents)}
    for i, ids in enumerate(tokenise(tokenizers, prompts)):
        data[f"ids{i}"] = ids.int()
    torch.save(data, cache)
    print(f"{len(prompts)} images encoded in {time.time() - start:.0f}s", flush=True)
    return data


def build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, then linear to zero over the last 30 %."""
    return peak * min(1.0, (step + 1) / 200, max(0.0, (steps - step) / (0.3 * steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--shift", type=float, default=1.5, help="shift of the shipped scheduler")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    tokenizers = [
        vocabulary.write_clip(out / "tokenizer", "<|endoftext|>"),
        vocabulary.write_clip(out / "tokenizer_2", "!"),
        vocabulary.write_t5(out / "tokenizer_3"),
    ]
    data = dataset(vae, tokenizers, args.images, out / "latents.pt")
    empty = tokenise(tokenizers, [""])
    torch.manual_seed(0)
    text = TextEncoders(
        len(tokenizers[0]),
        len(tokenizers[2]),
        tokenizers[0].eos_token_id,
        (tokenizers[0].pad_token_id, tokenizers[1].pad_token_id),
    )
    model = build_transformer()
    nets = torch.nn.ModuleList([model, text])
    average = copy.deepcopy(nets)
    print(
        "parameters: transformer",
        sum(p.numel() for p in model.parameters()),
        "text",
        sum(p.numel() for p in text.parameters()),
        flush=True,
    )
    optimiser = torch.optim.AdamW(
        nets.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(1)
    first, checkpoint = 0, out / "training.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        nets.load_state_dict(saved["nets"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"])
        first = saved["step"]
    start, total = time.time(), 0.0
    for step in range(first, args.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, 1.5e-3)
        index = torch.randint(len(data["latents"]), (args.batch,), generator=generator)
        x0 = data["latents"][index].float()
        drop = torch.rand(args.batch, generator=generator) < 0.05
        ids = tuple(
            torch.where(drop[:, None], empty[i], data[f"ids{i}"][index].long()) for i in range(3)
        )
        u = torch.randn(args.batch, generator=generator)
        sigma = torch.sigmoid(u + 0.3)
        noise = torch.randn(x0.shape, generator=generator)
        s = sigma[:, None, None, None]
        embeds, pooled = text(ids)
        velocity = model((1 - s) * x0 + s * noise, embeds, pooled, sigma * 1000, return_dict=False)[
            0
        ]
        loss = F.mse_loss(velocity, noise - x0)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimiser.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), 1 - decay)
        total += loss.item()
        if (step + 1) % 100 == 0:
            rate = (time.time() - start) / (step + 1 - first)
            print(f"{step + 1} loss {total / 100:.4f} {rate:.3f}s/step", flush=True)
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            torch.save(
                {
                    "nets": nets.state_dict(),
                    "average": average.state_dict(),
                    "step": step + 1,
                    "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(),
                },
                checkpoint,
            )
            model_, text_ = average
            scheduler = FlowMatchEulerDiscreteScheduler(shift=args.shift)
            StableDiffusion3Pipeline(
                transformer=model_,
                scheduler=scheduler,
                vae=vae,
                text_encoder=text_.one,
                tokenizer=tokenizers[0],
                text_encoder_2=text_.two,
                tokenizer_2=tokenizers[1],
                text_encoder_3=text_.three,
                tokenizer_3=tokenizers[2],
            ).save_pretrained(str(out / "diffusers"))


if __name__ == "__main__":
    main()
