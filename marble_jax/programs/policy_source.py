"""What draws images, and how: a model or a policy of a run with LoRAs on top, and the settings of a drawing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from marble_jax.errors import InputError
from marble_jax.validation import short

if TYPE_CHECKING:
    from marble_jax.config import RolloutSettings


@dataclasses.dataclass(frozen=True)
class PolicySource:
    """What draws: a model, or a policy of a training run, perhaps with LoRAs on top.

    Attributes:
      model: diffusers-layout directory, hub id or "embedded"; empty with `workdir`.
      workdir: a training run.
      policy: which of the run's policies; "base" is its model without adapter.
      loras: LoRAs to add, `PATH[:weight],PATH[:weight]`.
    """

    model: str = ""
    workdir: str = ""
    policy: str = "ema"
    loras: str = ""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn.

    Attributes:
      seed: image i starts from noise of (seed, i).
      num_steps: solver steps.
      solver: name of the solver.
      guidance: classifier-free guidance scale; 1 or less is off. The run's, or off when None.
      negative: the negative prompt, for guidance; the run's, or an empty one when None.
      embedded_guidance: guidance scale as an input of a guidance-distilled model; the run's, or none when None.
      size: (height, width) in pixels; the run's, or the model's own when None.
      max_sequence_length: tokens a prompt; the run's, or the model's own when None.
      omit_text_encoders: component names of text encoders to leave out, besides those that a run leaves out.
      dtype: of the transformer's weights and products; the run's, or what suits the machine when None.
      num_frames: of a clip; the run's, or the model's own when None.
      batch: images at once.
      embedding_cache: folder of text embeddings; with one, no text encoder is in memory while images are drawn.
      stream_dtype: of the token streams, "compute" (that of `dtype`) or "float32"; the run's, or "compute" when None.
      integer_timesteps: whether the network's timesteps are whole numbers, as in upstream's evaluations; in an
        evaluation the first run's, else False when None, as are steps and solver.
    """

    seed: int = 0
    num_steps: int = 40
    solver: str = "euler"
    guidance: float | None = None
    negative: str | None = None
    embedded_guidance: float | None = None
    size: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    omit_text_encoders: tuple[str, ...] = ()
    dtype: str | None = None
    num_frames: int | None = None
    batch: int = 8
    embedding_cache: str = ""
    stream_dtype: str | None = None
    integer_timesteps: bool | None = None

    @property
    def guided(self) -> bool:
        """Whether guidance is on."""
        return self.guidance is not None and self.guidance > 1

    def guided_as(self, rollout: RolloutSettings | None) -> SamplingSettings:
        """The same settings with the guidance and the negative prompt of a run's samples where none is asked for.

        Raises:
          InputError: a negative prompt is asked for and guidance is off.
        """
        guidance, negative = self.guidance, self.negative
        if guidance is None:
            guidance = 1.0 if rollout is None else rollout.guidance_scale
        if negative is None:
            negative = "" if rollout is None else rollout.negative_prompt
        return self.guided_by(guidance, negative)

    def guided_by(self, guidance: float, negative: str) -> SamplingSettings:
        """The same settings with a guidance, and with a negative prompt where that is on.

        Raises:
          InputError: a negative prompt is asked for and guidance is off.
        """
        if self.negative and not guidance > 1:
            raise InputError(
                f"--negative: expected none without guidance (--guidance=SCALE above 1 turns it on); received "
                f"{short(self.negative)}"
            )
        negative = negative if guidance > 1 else ""
        return dataclasses.replace(self, guidance=guidance, negative=negative)
