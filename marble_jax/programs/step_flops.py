"""FLOPs and network passes of an optimiser step: what the method asks for, whatever the devices do to get there.

Used before a run by `marble-jax plan` and during it for the TFLOP/s of the step line. Rewards are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from marble_jax.config import ModelSettings, RolloutSettings, Settings
from marble_jax.distributed.accelerators import Accelerator
from marble_jax.families.base import Networks
from marble_jax.families.descriptions import SampleFlops
from marble_jax.networks.attention import FUSED, choose
from marble_jax.objectives.base import Objective
from marble_jax.objectives.registry import make_objective
from marble_jax.programs.noisy_rollouts import trains_guided
from marble_jax.programs.open_model import size_of
from marble_jax.training.anchor_spacing import fewest_anchored
from marble_jax.training.batch_sizes import Sizes
from marble_jax.types import DTYPES, Adapter


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimiser step over all devices.

    Attributes:
      rollout: sampling the images.
      decode: their latents to pixels.
      solve: training, in a step that takes every reward's gradient.
      between: training, in a step that reuses alpha; equal to `solve` where there are none.
      recomputed: what rematerialisation adds to a training step.
      solve_share: share of steps that solve.
      signal: training, of one micro-batch of a solving step without anchors and divergence.
      skipped: what a step saves of training where micro-batches without anchors do without the rollout policy; `solve`
        and `between` are of steps that ask it.
    """

    rollout: float
    decode: float
    solve: float
    between: float
    recomputed: float
    solve_share: float
    signal: float
    skipped: float = 0.0

    @property
    def train(self) -> float:
        """Training, on average over steps."""
        return self.solve_share * self.solve + (1 - self.solve_share) * self.between

    def trained(self, solved: bool, skipped: bool = False) -> float:
        """Training, of a step that solved for alpha or did not, and asked the rollout policy every time or did not."""
        saved = self.skipped if skipped else 0.0
        if solved:
            return self.solve - saved
        return self.between - saved


@dataclasses.dataclass(frozen=True)
class NetworkPasses:
    """Passes through the transformer for one image, on average over optimiser steps.

    Attributes:
      rollout: calls that draw it.
      forward: forward passes of training, of all policies that are asked.
      backward: backward passes of training, one for every cotangent that is pulled back.
    """

    rollout: float
    forward: float
    backward: float


def step_flops(settings: Settings, sizes: Sizes, sample: SampleFlops, decode: float) -> StepFlops:
    """FLOPs of a step.

    Args:
      settings: of the run.
      sizes: its batch arithmetic.
      sample: FLOPs of the transformer at one sample.
      decode: FLOPs of decoding one image.
    """
    objective = make_objective(settings)
    micro_batch = sizes.samples / sizes.micro_batches
    num_anchored = _num_anchored(settings, sizes)
    signal = _signal_flops(objective, sample)
    signals = sizes.samples * signal
    between = signals + micro_batch * num_anchored * _reference_flops(objective, sample)
    if settings.harmonize.is_upstream:
        # Alpha is solved on one micro-batch of the step.
        solve = between + micro_batch * _solve_flops(objective, sample)
    else:
        solve = signals + micro_batch * num_anchored * _anchor_flops(objective, sample)
    solve_share = 1.0
    if settings.harmonize.mode != "exact":
        solve_share = 1 / settings.harmonize.refresh_every
    if solve_share == 1:
        between = solve
    # What a micro-batch without anchors does without where the two policies are one.
    saved = 0.0
    if settings.nft.skip_rollout_pass:
        saved = micro_batch * objective.rollout_passes * sample.forward
    # A guided policy is the network at two prompts, in every pass of training.
    prompts = 2 if trains_guided(settings) else 1
    return StepFlops(
        rollout=_rollout_flops(settings.rollout, sizes.images, sample),
        decode=sizes.images * decode,
        solve=prompts * solve,
        between=prompts * between,
        recomputed=prompts * sizes.samples * _recomputed_flops(settings.model, sample),
        solve_share=solve_share,
        signal=prompts * (micro_batch * signal - saved),
        skipped=prompts * (sizes.micro_batches - num_anchored) * saved,
    )


def _num_anchored(settings: Settings, sizes: Sizes) -> int:
    """Micro-batches of a step with anchors and divergence, at least; `anchor_error` may ask for more."""
    if settings.harmonize.is_upstream:
        return sizes.micro_batches
    # Each update rounds up by itself.
    updates = settings.training.updates_per_rollout
    of_update = fewest_anchored(sizes.micro_batches // updates, settings.harmonize.anchor_every)
    return updates * of_update


def _signal_flops(objective: Objective, sample: SampleFlops) -> float:
    """The trained policy's velocity, the rollout policy's where it is asked, and one cotangent pulled back."""
    return (1 + objective.rollout_passes) * sample.forward + sample.backward


def _anchor_flops(objective: Objective, sample: SampleFlops) -> float:
    """The base model's velocity where it is asked, and the cotangents that no advantage scales."""
    unscaled = objective.num_directions - 1
    return _reference_flops(objective, sample) + unscaled * sample.backward


def _solve_flops(objective: Objective, sample: SampleFlops) -> float:
    """What upstream's solve adds at a sample: the signal pulled back, and the divergence where there is one."""
    scaled = objective.num_directions - objective.num_anchors
    return scaled * sample.backward


def _reference_flops(objective: Objective, sample: SampleFlops) -> float:
    """The base model's velocity, where the divergence from it is part of the loss."""
    return sample.base if objective.kl_weight > 0 else 0.0


def _rollout_flops(settings: RolloutSettings, images: int, sample: SampleFlops) -> float:
    """Sampling of a step's images."""
    # Guidance asks the network about the negative prompt, too.
    calls = settings.num_steps * (2 if settings.guided else 1)
    # A merged policy has no low-rank products.
    return images * calls * (sample.base if settings.merge_adapter else sample.forward)


def _recomputed_flops(settings: ModelSettings, sample: SampleFlops) -> float:
    """What rematerialisation computes again at a sample."""
    recomputed = {"none": 0.0, "full": sample.recomputed, "dots": sample.attention, "products": 0.0}
    attention = settings.attention
    # A plan says which one its devices take; a run takes what this machine's do.
    if attention == "auto":
        attention = choose(attention, DTYPES[settings.dtype], jax.default_backend())
    if attention not in FUSED:
        # What attention keeps is no name's but a fused kernel's.
        recomputed["products"] = sample.attention
    return recomputed[settings.remat]


def step_flops_of(
    settings: Settings, sizes: Sizes, networks: Networks, adapter: Adapter
) -> StepFlops:
    """FLOPs of a step of a run; weights and adapter may be shapes."""
    size = size_of(settings.model)
    sample = networks.sample_flops(adapter, size, settings.model.max_sequence_length)
    return step_flops(settings, sizes, sample, networks.decoder_flops(size))


def network_passes(settings: Settings, sizes: Sizes) -> NetworkPasses:
    """Passes through the transformer for an image of a run, reckoned as if the rollout policy were asked every time."""
    # A pass that costs 1 is counted by what all of them cost.
    forward = SampleFlops(base=1.0, forward=1.0, backward=0.0, recomputed=0.0, attention=0.0)
    backward = SampleFlops(base=0.0, forward=0.0, backward=1.0, recomputed=0.0, attention=0.0)
    forwards = step_flops(settings, sizes, forward, 0.0)
    backwards = step_flops(settings, sizes, backward, 0.0)
    return NetworkPasses(
        rollout=forwards.rollout / sizes.images,
        forward=forwards.train / sizes.images,
        backward=backwards.train / sizes.images,
    )


def speed(
    flops: StepFlops,
    record: Mapping[str, Any],
    images: int,
    num_devices: int,
    accelerator: Accelerator | None,
) -> dict[str, float]:
    """Images a second, TFLOP/s a device and, where the device's peak is known, the share of it (MFU), of one step.

    MFU counts what the method asks for and not what rematerialisation adds, as Chowdhery et al. 2022
    (arXiv 2204.02311) define it. The figures of the whole step count the wait for rewards as time.

    Args:
      flops: of a step.
      record: the step's record, with its seconds.
      images: sampled in a step.
      num_devices: of the whole run.
      accelerator: what the devices are; None for an unknown one.
    """
    solved = bool(record.get("harmonize/refreshed", 1.0))
    skipped = bool(record.get("training/rollout_skipped", 0.0))
    train = flops.trained(solved, skipped)
    seconds = {"": record["time/step_s"], "train_": record["time/train_s"]}
    counts = {"": flops.rollout + flops.decode + train, "train_": train}
    figures = {"speed/images_per_s": images / seconds[""]}
    for part, count in counts.items():
        rate = count / seconds[part] / num_devices
        figures[f"speed/{part}tflops_per_device"] = rate / 1e12
        if accelerator is not None:
            figures[f"speed/{part}mfu"] = rate / accelerator.flops
    return figures
