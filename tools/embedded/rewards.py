"""Trains the embedded reward models, in the layout of transformers' CLIPModel.

    python tools/embedded/rewards.py align     --base BUILD/pipeline --out BUILD/rewards
    python tools/embedded/rewards.py prefer    --base BUILD/pipeline --out BUILD/rewards
    python tools/embedded/rewards.py judge     --base BUILD/pipeline --out BUILD/rewards

`align` is a contrastive text-image model of the world. `prefer` starts from it and learns which of two images of one
prompt is better, with an affine MLP on its image embedding that rates how clean an image is. `judge` shares nothing
with the others (own seed, size and images); it is never trained on and tells reward hacking from progress.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import vocabulary
import world
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def build(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPModel:
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=vocabulary.CLIP_LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )
    vision = dict(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=64,
        hidden_act="quick_gelu",
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, 64, 64] in [0, 1] -> CLIP's mean and standard deviation."""
    return (images - MEAN) / STD


def to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def blur(x: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x


def soften(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mild blur and noise, as a flow model's samples have them."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.4, blur(x, 1), x)
    amount = 0.06 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return (x + amount * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def mutate(prompt: str, rng: random.Random) -> str | None:
    """A prompt that differs in one word (ink, shape, count, relation, background) or one letter."""
    words = prompt.split(" ")
    spots = []
    shapes = [world.plural(s, k) for s in world.SHAPES for k in (1, 2)]
    for i, word in enumerate(words):
        for family in (
            list(world.INKS),
            list(world.BACKGROUNDS),
            shapes[::2],
            shapes[1::2],
            ["two", "three"],
            ["above", "below"],
            ["left", "right"],
        ):
            if word in family:
                spots.append((i, [w for w in family if w != word]))
        if word.startswith('"'):
            k = rng.choice((1, 2))
            spots += 4 * [
                (i, [word[:k] + c + word[k + 1 :] for c in world.LETTERS if c != word[k]])
            ]
    if not spots:
        return None
    i, choices = rng.choice(spots)
    return " ".join([*words[:i], rng.choice(choices), *words[i + 1 :]])


def text_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> dict[str, torch.Tensor]:
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=vocabulary.CLIP_LENGTH,
        truncation=True,
        return_tensors="pt",
    )


def contrastive(
    out: Path, tokenizer: CLIPTokenizer, width: int, layers: int, steps: int, seed: int
) -> None:
    """CLIP's symmetric loss on fresh images; every batch adds one near-miss text an image."""
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model = build(tokenizer, width, layers)
    model.logit_scale.data.fill_(np.log(10.0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.1)
    batch, start = 128, time.time()
    for step in range(steps):
        drawn = [world.draw(rng) for _ in range(batch)]
        images = soften(to_tensor([world.render(scene(rng)) for _, _, scene in drawn]), generator)
        prompts = [prompt for prompt, _, _ in drawn]
        wrong = [mutate(p, rng) or p for p in prompts]
        same = torch.tensor([a == b for a, b in zip(prompts, wrong)])
        image = F.normalize(model.get_image_features(normalise(images)).pooler_output, dim=-1)
        text = F.normalize(
            model.get_text_features(**text_ids(tokenizer, prompts + wrong)).pooler_output, dim=-1
        )
        scale = model.logit_scale.clamp(max=np.log(100.0)).exp()
        logits = scale * image @ text.T
        equal = torch.tensor([[a == b for b in prompts] for a in prompts]) & ~torch.eye(
            batch, dtype=torch.bool
        )
        square = logits[:, :batch].masked_fill(equal, -1e4)
        near = torch.where(
            same,
            torch.full((batch,), -1e4),
            logits[torch.arange(batch), batch + torch.arange(batch)],
        )
        target = torch.arange(batch)
        loss = (
            F.cross_entropy(torch.cat([square, near[:, None]], 1), target)
            + F.cross_entropy(square.T, target)
            + F.softplus(near - square.diagonal())[~same].mean()
        ) / 3
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            accuracy = (square.argmax(1) == target).float().mean()
            fine = (square.diagonal() > near)[~same].float().mean()
            print(
                f"{step + 1} loss {loss.item():.3f} in-batch {accuracy:.3f} near-miss {fine:.3f} "
                f"scale {scale.item():.1f} {time.time() - start:.0f}s",
                flush=True,
            )
    model.save_pretrained(str(out))
    save_tokenizer(tokenizer, out)


def save_tokenizer(tokenizer: CLIPTokenizer, out: Path) -> None:
    tokenizer.save_pretrained(str(out))
    (out / "preprocessor_config.json").write_text(
        '{"crop_size": {"height": 64, "width": 64}, "do_center_crop": true, "do_normalize": true, "do_resize": true,\n'
        ' "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],\n'
        ' "image_processor_type": "CLIPImageProcessor", "resample": 3, "size": {"shortest_edge": 64}}\n'
    )


class Flaws:
    """Images with a known degree of flaws in [0, 1]: noise in the latent, blur, pixel noise, model samples."""

    def __init__(self, base: Path, seed: int):
        self.pipe = StableDiffusion3Pipeline.from_pretrained(str(base / "diffusers"))
        self.pipe.set_progress_bar_config(disable=True)
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def latent_noise(self, images: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        z = vae.encode(images * 2 - 1).latent_dist.mean
        noise = torch.randn(z.shape, generator=self.generator) / vae.config.scaling_factor
        return (vae.decode(z + amount[:, None, None, None] * noise).sample * 0.5 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def samples(self, prompts: list[str], steps: int) -> torch.Tensor:
        noise = torch.randn((len(prompts), 16, 8, 8), generator=self.generator)
        return torch.from_numpy(
            self.pipe(
                prompts,
                num_inference_steps=steps,
                guidance_scale=1.0,
                latents=noise,
                output_type="np",
                height=64,
                width=64,
                max_sequence_length=vocabulary.T5_LENGTH,
            ).images
        ).permute(0, 3, 1, 2)

    def pairs(self, count: int) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts with a better and a worse image each, and ratings [2, count] from 1 (spoilt) to 10 (clean)."""
        prompts, better, worse, ratings = [], [], [], []
        for _ in range(count // 100):
            drawn = [world.draw(self.rng) for _ in range(100)]
            ps = [p for p, _, _ in drawn]
            good = to_tensor([world.render(scene(self.rng)) for _, _, scene in drawn])
            kind = self.rng.random()
            low = torch.rand(100, generator=self.generator) * 0.4
            if kind < 0.5:
                high = low + 0.4 + torch.rand(100, generator=self.generator)
                a, b, rated = (
                    self.latent_noise(good, low),
                    self.latent_noise(good, high),
                    (9 - 4 * low, 9 - 4 * high),
                )
            elif kind < 0.75:
                steps = self.rng.choice((4, 6, 10))
                a, b = self.latent_noise(good, low), self.samples(ps, steps)
                rated = (9 - 4 * low, torch.full((100,), {4: 3.0, 6: 4.5, 10: 6.0}[steps]))
            else:
                times = self.rng.choice((1, 2, 4))
                a, b = good, blur(self.latent_noise(good, low), times)
                rated = (torch.full((100,), 9.0), 8 - 4 * low - times)
            prompts += ps
            better.append(a)
            worse.append(b)
            ratings.append(torch.stack(rated))
        return prompts, torch.cat(better), torch.cat(worse), torch.cat(ratings, 1)


HEAD_KEYS, HEAD_WIDTHS = (0, 2, 4, 6, 7), (64, 64, 32, 16, 8, 1)


def head() -> torch.nn.Sequential:
    """The published aesthetic predictor's shape, without its (inactive) dropouts: linear layers, nothing between."""
    return torch.nn.Sequential(
        *[torch.nn.Linear(a, b) for a, b in zip(HEAD_WIDTHS, HEAD_WIDTHS[1:])]
    )


def prefer(base: Path, out: Path, tokenizer: CLIPTokenizer, steps: int = 900) -> None:
    """Teaches the contrastive model which of two images is better, and a head on its image embedding to rate them.

    Preference is PickScore's: -log sigmoid(scale (cos(t, better) - cos(t, worse))), beside the near-miss texts.
    """
    torch.manual_seed(5)
    start = time.time()
    prompts, better, worse, ratings = Flaws(base, 31).pairs(8000)
    print(f"{len(prompts)} pairs in {time.time() - start:.0f}s", flush=True)
    model, rater = CLIPModel.from_pretrained(str(out / "alignment")), head()
    model.logit_scale.data.fill_(np.log(20.0))
    model.logit_scale.requires_grad_(False)
    optimiser = torch.optim.AdamW(
        [p for p in (*model.parameters(), *rater.parameters()) if p.requires_grad],
        lr=1e-3,
        weight_decay=0.1,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, steps, pct_start=0.1)
    rng, generator = random.Random(37), torch.Generator().manual_seed(37)
    held = 300
    for step in range(steps + 1):
        last = step == steps
        index = (
            torch.arange(len(prompts) - held, len(prompts))
            if last
            else torch.randint(len(prompts) - held, (48,), generator=generator)
        )
        chosen = [prompts[i] for i in index]
        wrong = [mutate(p, rng) or p for p in chosen]
        same = torch.tensor([a == b for a, b in zip(chosen, wrong)])
        with torch.set_grad_enabled(not last):
            images = torch.cat([better[index], worse[index]])
            if not last:
                shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
                images = torch.roll(images, shift, (2, 3))
            image = F.normalize(model.get_image_features(normalise(images)).pooler_output, dim=-1)
            text = F.normalize(
                model.get_text_features(**text_ids(tokenizer, chosen + wrong)).pooler_output, dim=-1
            )
            n = len(chosen)
            good, bad = (text[:n] * image[:n]).sum(-1), (text[:n] * image[n:]).sum(-1)
            near = (text[n:] * image[:n]).sum(-1)
            rated, true = rater(image)[:, 0], ratings[:, index].reshape(-1)
            scale = model.logit_scale.exp()
            loss = (
                F.softplus(scale * (bad - good)).mean()
                + 0.5 * F.softplus(scale * (near - good))[~same].mean()
                + 0.1 * F.mse_loss(rated, true)
            )
        if last or (step + 1) % 100 == 0:
            print(
                f"{step + 1} loss {loss.item():.3f} pairs right {(good > bad).float().mean():.3f} near-miss "
                f"{(good > near)[~same].float().mean():.3f} ratings correlate "
                f"{np.corrcoef(rated.detach(), true)[0, 1]:.3f} {time.time() - start:.0f}s",
                "(held-out pairs)" if last else "",
                flush=True,
            )
        if not last:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.save_pretrained(str(out / "preference"))
    save_tokenizer(tokenizer, out / "preference")
    (out / "aesthetic").mkdir(parents=True, exist_ok=True)
    save_file(
        {
            f"layers.{k}.{n}": p.detach().clone()
            for k, layer in zip(HEAD_KEYS, rater)
            for n, p in layer.named_parameters()
        },
        str(out / "aesthetic" / "model.safetensors"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("align", "prefer", "judge"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(str(args.base / "tokenizer"))
    if args.what == "align":
        contrastive(args.out / "alignment", tokenizer, 96, 3, args.steps, seed=3)
    elif args.what == "judge":
        contrastive(args.out / "judge", tokenizer, 64, 3, args.steps, seed=91)
    else:
        prefer(args.base, args.out, tokenizer)


if __name__ == "__main__":
    main()
