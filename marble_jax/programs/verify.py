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
from marble_jax.families.base import Family
from marble_jax.families.decoding import Decoder
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.flow.policy_sampler import image_noise, make_sampler
from marble_jax.types import Adapter
from marble_jax.weights.safetensors_files import SafetensorsDir

TOLERANCE = 1e-2
"""Largest difference of a pixel, of 1, between our image and another library's."""
STRENGTH_TOLERANCE = 0.05
ROUNDED_TOLERANCE, ROUNDED_STRENGTH_TOLERANCE = 5e-2, 0.25
"""Tolerances for weights that were merged and then rounded to 16 bits: rounding moves every weight by up to 1/256."""
LEAST_EFFECT = 1e-3
"""Largest change of a pixel below which an adapter counts as without effect."""
PACKAGES = ("torch", "diffusers", "peft")
NUM_STEPS, SEED = 4, 0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is drawn.

    Attributes:
      model: directory of the base pipeline.
      family: of the base model.
      prompt: the text.
      size: of the image.
      max_sequence_length: tokens a prompt. Optional text encoders are left out, as the adapter does not reach them.
      lora_scale: alpha / rank.
      embedded_guidance: guidance scale as an input of the model; None for a model that takes none.
    """

    model: Path
    family: Family
    prompt: str
    size: Size
    max_sequence_length: int
    lora_scale: float
    embedded_guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class OurImages:
    """What the trainer draws, and what it draws from.

    Attributes:
      noise: [1, *latent].
      cond: conditioning of the prompt, named arrays [1, ...].
      base: float32 [1, F, H, W, 3] in [0, 1] of the base model.
      adapted: the same with the adapter.
    """

    noise: np.ndarray
    cond: dict[str, np.ndarray]
    base: np.ndarray
    adapted: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """Difference that the adapter makes."""
        return self.adapted - self.base


@dataclasses.dataclass(frozen=True)
class Reading:
    """What another library draws.

    Attributes:
      name: of the reader.
      rounded: whether its weights are rounded to 16 bits.
      base: its image without the adapter.
      adapted: its image with the adapter.
    """

    name: str
    rounded: bool
    base: np.ndarray
    adapted: np.ndarray


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
    effect = float(np.abs(ours.change).max())
    console.say(
        f'verify: "{drawing.prompt}", seed {SEED}, {NUM_STEPS} steps, {drawing.size} px, float32; '
        f"the adapter changes a pixel by up to {effect:.4f}"
    )
    if effect < LEAST_EFFECT:
        raise InputError(
            f"--verify: expected an adapter that changes a pixel by {LEAST_EFFECT} or more; received one "
            f"without effect (largest change {effect:.1g})"
        )
    readers, failures = _compare(folder, drawing, ours, console)
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


def _compare(
    folder: epath.Path, drawing: Drawing, ours: OurImages, console: Console
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Difference and strength of every reader, and what is wrong with those that draw another image."""
    readers: dict[str, dict[str, float]] = {}
    failures = []
    # All of them, so that one run tells every reader that fails.
    for reading in _readings(folder, drawing, ours):
        difference = float(np.abs(reading.adapted - ours.adapted).max())
        strength = _strength(reading.adapted - reading.base, ours.change)
        readers[reading.name] = {"difference": difference, "strength": strength}
        console.say(
            f"  {reading.name:10} largest difference {difference:.5f}  strength {strength:.3f}"
        )
        failure = _failure(reading, difference, strength)
        if failure:
            failures.append(failure)
    return readers, failures


def _strength(change: np.ndarray, expected: np.ndarray) -> float:
    """Projection of a reader's change on ours, 1 when they are equal."""
    return float(np.vdot(change, expected) / np.vdot(expected, expected))


def _failure(reading: Reading, difference: float, strength: float) -> str:
    """What is wrong with another library's image; empty where nothing is."""
    limit, spread = TOLERANCE, STRENGTH_TOLERANCE
    if reading.rounded:
        limit, spread = ROUNDED_TOLERANCE, ROUNDED_STRENGTH_TOLERANCE
    # False for a strength that is not a number.
    if difference <= limit and abs(strength - 1) <= spread:
        return ""
    if abs(strength) > spread:
        return (
            f"{reading.name} drew another one (largest difference {difference:.4f}, "
            f"strength {strength:.2f})"
        )
    return f"{reading.name} drew as if there were no LoRA"


def _our_images(drawing: Drawing, adapter: Adapter) -> OurImages:
    """Draws with the trainer's own networks."""
    family, root = drawing.family, drawing.model
    guidance = drawing.embedded_guidance
    options = NetworkOptions(lora_scale=drawing.lora_scale, embedded_guidance=guidance)
    networks = family.open(root, options)
    # Without the optional ones, which may be most of the model: the adapter does not reach them.
    encoders = family.open_text_encoders(root, jnp.float32, family.optional_text_encoders)
    shape = networks.latent_shape(drawing.size)
    # As the pipeline of the other library samples.
    sampler = make_sampler(
        networks.velocity,
        networks.pipeline_solver,
        networks.levels(NUM_STEPS, shape),
        network_sigmas=networks.network_levels(NUM_STEPS, shape),
    )
    cond = encoders.encode([drawing.prompt], drawing.max_sequence_length)
    noise = image_noise(jax.random.key(SEED), [0], shape)
    decoder = Decoder(networks)

    def draw(policy: Adapter | None) -> np.ndarray:
        return np.asarray(decoder(sampler(networks.params, policy, cond, noise), 1), np.float32)

    # The CPU's default is exact; elsewhere it may be a 16-bit product.
    with jax.default_matmul_precision("highest"):
        base, adapted = draw(None), draw(adapter)
    arrays = {name: np.asarray(array, np.float32) for name, array in cond.items()}
    return OurImages(np.asarray(noise, np.float32), arrays, base, adapted)


def _readings(folder: epath.Path, drawing: Drawing, ours: OurImages) -> Iterator[Reading]:
    """Draws with every other library, one after the other."""
    import diffusers
    import peft
    import torch

    pipe = _base_pipeline(drawing)
    draw = _drawer(pipe, drawing, ours)
    base = draw()
    readers: dict[str, Callable[[], Any]] = {
        "diffusers": lambda: pipe.load_lora_weights(str(folder)),
        "PEFT": lambda: peft.PeftModel.from_pretrained(
            pipe.transformer, str(folder), torch_device="cpu"
        ),
    }
    for name, read in readers.items():
        try:
            opened = read()
        except Exception as error:
            # Whatever a library makes of the folder is the finding; the cause stays attached.
            raise InputError(
                f"--verify: expected {name} to open the export; received {_reason(error)}"
            ) from error
        yield Reading(name, False, base, draw())
        # The next reader starts from the base model again; diffusers' loader returns nothing to unload by.
        if opened is None:
            pipe.unload_lora_weights()
        else:
            opened.unload()
    if (folder / "transformer").exists():
        transformer_class = getattr(diffusers, drawing.family.diffusers.transformer)
        merged = transformer_class.from_pretrained(
            str(folder), subfolder="transformer", local_files_only=True, use_safetensors=True
        )
        pipe.register_modules(transformer=merged.to(torch.float32))
        stored = SafetensorsDir(Path(folder / "transformer"))
        # Drawn in float32 like the others, from weights that may have been rounded when they were written.
        rounded = any(stored.dtype(key) != np.float32 for key in stored.keys())
        yield Reading("merged", rounded, base, draw())


def _base_pipeline(drawing: Drawing) -> Any:
    """The base model in diffusers, in float32 and without text encoders."""
    import transformers

    # Before diffusers is imported, whose imports chat through it.
    transformers.utils.logging.set_verbosity_error()
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    names = drawing.family.diffusers
    try:
        pipe = getattr(diffusers, names.pipeline).from_pretrained(
            str(drawing.model),
            local_files_only=True,
            trust_remote_code=False,
            **dict.fromkeys(names.without_text),
        )
    except Exception as error:
        # Whatever a library makes of the folder; the cause stays attached.
        raise InputError(
            f"--verify: expected a base model that diffusers opens; received {_reason(error)}"
        ) from error
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    return pipe


def _drawer(pipe: Any, drawing: Drawing, ours: OurImages) -> Callable[[], np.ndarray]:
    """A function that draws with whatever the pipeline holds, from the trainer's noise and conditioning."""
    import torch

    names = drawing.family.diffusers
    noise = torch.tensor(names.pack_latents(ours.noise))
    # One argument of diffusers' for both: the scale as an input, and classifier-free guidance, which is off at 1.
    guidance = drawing.embedded_guidance or 1.0
    cond = {}
    for name, argument in names.conditioning.items():
        cond[argument] = torch.tensor(ours.cond[name])
    size = {"height": drawing.size.height, "width": drawing.size.width}
    if names.num_frames is not None:
        size[names.num_frames] = drawing.size.num_frames

    def draw() -> np.ndarray:
        images = pipe(
            latents=noise,
            num_inference_steps=NUM_STEPS,
            guidance_scale=guidance,
            output_type="np",
            **size,
            **cond,
        )[0]
        # Image pipelines return [N, H, W, 3]; ours are clips, of one frame then.
        return np.asarray(images).reshape(ours.base.shape)

    return draw


def _reason(error: Exception) -> str:
    """Another library's error in one line, cut where it goes on and on."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
