"""FLOPs of an optimiser step: what the recipe asks for, whatever the devices do to get there.

Used before a run by `marble-jax plan` and during it for the TFLOP/s of the step line. Rewards are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from marble_jax.distributed.accelerators import Accelerator
from marble_jax.families.sd3.flops import Work, decoder, transformer
from marble_jax.families.sd3.pipeline import Pipeline
from marble_jax.families.sd3.text import clip_length
from marble_jax.training.batch_sizes import Sizes
from marble_jax.types import Adapter


@dataclasses.dataclass(frozen=True)
class StepWork:
    """FLOPs of one optimiser step over all devices.

    Attributes:
      rollout: sampling the images.
      decode: their latents to pixels.
      solve: training, in a step that takes every reward's gradient.
      between: training, in a step that reuses alpha; equal to `solve` where there are none.
      recomputed: what rematerialisation adds to a training step.
      solve_share: share of steps that solve.
    """

    rollout: float
    decode: float
    solve: float
    between: float
    recomputed: float
    solve_share: float

    @property
    def train(self) -> float:
        """Training, on average over steps."""
        return self.solve_share * self.solve + (1 - self.solve_share) * self.between

    def trained(self, solved: bool) -> float:
        """Training, of a step that solved for alpha or did not."""
        return self.solve if solved else self.between


def step_work(
    config: ml_collections.ConfigDict, sizes: Sizes, sample: Work, decode: float
) -> StepWork:
    """The work of a step of `config`.

    Args:
      config: the run's configuration.
      sizes: its batch arithmetic.
      sample: work of the transformer at one sample.
      decode: FLOPs of decoding one image.
    """
    harmonize, reference = config.harmonize, config.nft.kl_weight > 0
    micro = sizes.samples / sizes.micro_batches
    signal = 2 * sample.forward + sample.backward
    anchor = reference * sample.base + (1 + reference) * sample.backward
    between = sizes.samples * (signal + reference * sample.base)
    if harmonize.mode == "upstream":
        share = 1 / harmonize.refresh_every
        solve = between + micro * (1 + reference) * sample.backward
    else:
        share = 1.0 if harmonize.mode == "exact" else 1 / harmonize.refresh_every
        anchored = -(-sizes.micro_batches // harmonize.anchor_every)
        solve = sizes.samples * signal + micro * anchored * anchor
    again = {"none": 0.0, "full": sample.recomputed, "dots": sample.attention}[config.model.remat]
    forward = sample.base if config.rollout.merge_adapter else sample.forward
    return StepWork(
        rollout=sizes.images * config.rollout.num_steps * forward,
        decode=sizes.images * decode,
        solve=solve,
        between=solve if share == 1 else between,
        recomputed=sizes.samples * again,
        solve_share=share,
    )


def speed(
    work: StepWork,
    record: Mapping[str, Any],
    images: int,
    num_devices: int,
    chip: Accelerator | None,
) -> dict[str, float]:
    """Images a second, TFLOP/s a device and, where the chip's peak is known, the share of it (MFU), of one step.

    MFU counts what the recipe asks for and not what rematerialisation adds, as Chowdhery et al. 2022
    (arXiv 2204.02311) define it. The figures of the whole step count the wait for rewards as time.

    Args:
      work: of a step.
      record: the step's record, with its seconds.
      images: sampled in a step.
      num_devices: of the whole run.
      chip: what the devices are; None for an unknown one.
    """
    train = work.trained(bool(record.get("harmonize/refreshed", 1.0)))
    seconds = {"": record["time/step_s"], "train_": record["time/train_s"]}
    flops = {"": work.rollout + work.decode + train, "train_": train}
    found = {"speed/images_per_s": images / seconds[""]}
    for part, count in flops.items():
        rate = count / seconds[part] / num_devices
        found[f"speed/{part}tflops_per_device"] = rate / 1e12
        if chip is not None:
            found[f"speed/{part}mfu"] = rate / chip.flops
    return found


def work_of(
    config: ml_collections.ConfigDict, sizes: Sizes, pipeline: Pipeline, adapter: Adapter
) -> StepWork:
    """The work of a step of a run whose model is loaded."""
    height, width, _ = pipeline.latent_shape(config.model.height, config.model.width)
    architecture = pipeline.model.config
    sample = transformer(
        architecture,
        pipeline.params,
        adapter,
        height * width // architecture.patch_size**2,
        clip_length(pipeline.directory) + config.model.max_sequence_length,
    )
    return step_work(
        config, sizes, sample, decoder(pipeline.vae.config, pipeline.vae_params, height, width)
    )
