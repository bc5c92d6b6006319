"""Proof of an export: other libraries open the folder and draw the image that the trainer draws.

One fixed prompt and noise, a few steps, float32. Every reader draws with and without the adapter; compared are the
images, and the strength: the projection of its change on ours, 1 when right, 1/2 for an adapter that loads at half
strength, 0 for one that loads and does nothing. Images alone would pass a weak adapter at any strength.

torch, diffusers and peft are imported here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.families.sd3 import transformer
from marble_jax.families.sd3.pipeline import load_pipeline
from marble_jax.flow.policy_sampler import image_noise, make_sampler
from marble_jax.types import Adapter
from marble_jax.weights.safetensors_files import SafetensorsDir

TOLERANCE = 1e-2
"""Largest difference of a pixel, of 1, between our image and another library's."""
STRENGTH_TOLERANCE = 0.05
ROUNDED_TOLERANCE, ROUNDED_STRENGTH_TOLERANCE = 5e-2, 0.25
"""The same for weights that were merged and then rounded to 16 bits: rounding moves every weight by up to 1/256."""
LEAST_EFFECT = 1e-3
"""Largest change of a pixel below which an adapter counts as without effect."""
PACKAGES = ("torch", "diffusers", "peft")
NUM_STEPS, SEED = 4, 0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is drawn.

    Attributes:
      model: directory of the base pipeline.
      prompt: the text.
      height: pixels.
      width: pixels.
      tokens: T5 tokens a prompt. T5 itself is left out, as the adapter does not reach it.
      lora_scale: alpha / rank.
    """

    model: epath.PathLike
    prompt: str
    height: int
    width: int
    tokens: int
    lora_scale: float


def check_packages() -> None:
    """Raises InputError unless the libraries to verify with are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--verify: expected the packages {', '.join(PACKAGES)}; received no {', '.join(missing)} "
            '(pip install "marble-jax[torch]")'
        )


def verify(
    folder: epath.Path, drawing: Drawing, adapter: Adapter, console: Console
) -> dict[str, Any]:
    """Opens an export with every library it is for, and compares.

    Args:
      folder: the export, possibly not yet in its place.
      drawing: what to draw.
      adapter: the adapter as it is trained.
      console: where the numbers go.

    Returns:
      `prompt`, `seed`, `num_steps`, `effect`, and by reader `difference` and `strength`.

    Raises:
      InputError: an adapter without effect, or a reader that draws another image.
    """
    check_packages()
    ours = _our_images(drawing, adapter)
    change = ours["with"] - ours["base"]
    effect = float(np.abs(change).max())
    console.say(
        f'verify: "{drawing.prompt}", seed {SEED}, {NUM_STEPS} steps, {drawing.height} x {drawing.width} px, float32; the '
        f"adapter changes a pixel by up to {effect:.4f}"
    )
    if effect < LEAST_EFFECT:
        raise InputError(
            f"--verify: expected an adapter that changes a pixel by {LEAST_EFFECT} or more; received one "
            f"without effect (largest change {effect:.1g})"
        )
    readers, failures = {}, []
    for name, rounded, base, image in _their_images(folder, drawing, ours):
        difference = float(np.abs(image - ours["with"]).max())
        strength = float(np.vdot(image - base, change) / np.vdot(change, change))
        readers[name] = {"difference": difference, "strength": strength}
        console.say(f"  {name:10} largest difference {difference:.5f}  strength {strength:.3f}")
        limit, spread = (
            (ROUNDED_TOLERANCE, ROUNDED_STRENGTH_TOLERANCE)
            if rounded
            else (TOLERANCE, STRENGTH_TOLERANCE)
        )
        if not (difference <= limit and abs(strength - 1) <= spread):
            failures.append(
                f"{name} drew another one (largest difference {difference:.4f}, strength {strength:.2f})"
                if abs(strength) > spread
                else f"{name} drew as if there were no LoRA"
            )
    if failures:
        raise InputError(
            f"--verify: expected the trainer's image within {TOLERANCE} a pixel at strength 1; "
            f"received: {'; '.join(failures)}; nothing was written"
        )
    return {
        "prompt": drawing.prompt,
        "seed": SEED,
        "num_steps": NUM_STEPS,
        "effect": effect,
        "readers": readers,
    }


def _our_images(drawing: Drawing, adapter: Adapter) -> dict[str, np.ndarray]:
    """Our images float32 [1, H, W, 3] in [0, 1], and what they start from."""
    pipeline = load_pipeline(
        drawing.model, dtype=jnp.float32, text_encoder_3=False, lora_scale=drawing.lora_scale
    )

    def velocity(
        params: Any, adapter: Any, xt: jax.Array, sigma: jax.Array, cond: Any
    ) -> jax.Array:
        return transformer.velocity(pipeline.model, params, adapter, xt, sigma, cond)

    sampler = make_sampler(velocity, NUM_STEPS, "euler", pipeline.scheduler.shift)
    cond = pipeline.encode_prompts([drawing.prompt], drawing.tokens)
    noise = image_noise(
        jax.random.key(SEED), [0], pipeline.latent_shape(drawing.height, drawing.width)
    )
    found = {"noise": noise, "embeds": cond.embeds, "pooled": cond.pooled}
    # The CPU's default is exact; elsewhere it may be a 16-bit product.
    with jax.default_matmul_precision("highest"):
        for name, one in (("base", None), ("with", adapter)):
            found[name] = pipeline.decode(sampler(pipeline.params, one, cond, noise), 1)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _their_images(
    folder: epath.Path, drawing: Drawing, ours: dict[str, np.ndarray]
) -> Iterator[tuple[str, bool, np.ndarray, np.ndarray]]:
    """Yields (reader, whether its weights are rounded, its image without adapter, its image with it)."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # diffusers' imports chat through it
    import diffusers
    import peft
    import torch

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    parts = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    try:
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
            str(drawing.model), local_files_only=True, **dict.fromkeys(parts)
        )
    except Exception as error:  # as below
        raise InputError(
            f"--verify: expected a base model that diffusers opens; received {_reason(error)}"
        ) from error
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    noise, embeds, pooled = (torch.tensor(ours[name]) for name in ("noise", "embeds", "pooled"))

    def draw() -> np.ndarray:
        return pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            latents=noise.permute(0, 3, 1, 2),
            num_inference_steps=NUM_STEPS,
            guidance_scale=1.0,
            height=drawing.height,
            width=drawing.width,
            output_type="np",
        ).images

    base = draw()
    reading: dict[str, Callable[[], Any]] = {
        "diffusers": lambda: pipe.load_lora_weights(str(folder)),
        "PEFT": lambda: peft.PeftModel.from_pretrained(
            pipe.transformer, str(folder), torch_device="cpu"
        ),
    }
    for name, read in reading.items():
        try:
            opened = read()
        except Exception as error:  # whatever a library makes of the folder is the finding; the cause stays attached
            raise InputError(
                f"--verify: expected {name} to open the export; received {_reason(error)}"
            ) from error
        yield name, False, base, draw()
        pipe.unload_lora_weights() if opened is None else opened.unload()
    if (folder / "transformer").exists():
        merged = diffusers.SD3Transformer2DModel.from_pretrained(
            str(folder), subfolder="transformer"
        )
        pipe.register_modules(transformer=merged.to(torch.float32))
        stored = SafetensorsDir(Path(folder / "transformer"))
        yield "merged", any(stored.dtype(key) != np.float32 for key in stored.keys()), base, draw()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
