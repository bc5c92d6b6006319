"""What a run's rollouts and evaluations share: everything between a prompt and its sample but solver and steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from marble_jax import distributed
from marble_jax.config import RolloutSettings
from marble_jax.distributed import device_mesh
from marble_jax.families.base import Networks
from marble_jax.families.decoding import Decoder, as_samples
from marble_jax.families.descriptions import Size
from marble_jax.flow.guided_policy import GuidedConditioning, guided_policy, repeated
from marble_jax.flow.policy_sampler import (
    Sampler,
    make_sampler,
    make_transition_sampler,
)
from marble_jax.flow.trajectory import Transitions
from marble_jax.programs.noisy_rollouts import network_levels_of, stochastic_of
from marble_jax.programs.open_model import decode_size
from marble_jax.training.batch_sizes import is_stochastic, window_of
from marble_jax.training.rollout import NoisyPath, NoisySampler
from marble_jax.types import Adapter, Conditioning, Params, PolicyVelocity


@dataclasses.dataclass(frozen=True)
class Imaging:
    """A run's model, ready to sample with.

    Attributes:
      networks: of the model.
      latent_shape: of one sample.
      encode: prompts to conditioning.
      decode: latents to images or clips.
      mesh: the devices.
      rollout: whose guidance evaluations have, too.
    """

    networks: Networks
    latent_shape: tuple[int, ...]
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[jax.Array], jax.Array]
    mesh: Mesh
    rollout: RolloutSettings
    _samplers: dict[tuple[Any, ...], Sampler] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def sampler(self, solver: str, num_steps: int, integer_timesteps: bool = False) -> Sampler:
        """A compiled sampler of the model, with the run's guidance; the same one whenever it is asked for again."""
        key = (solver, num_steps, integer_timesteps)
        if key not in self._samplers:
            self._samplers[key] = self._sampler(*key)
        return self._samplers[key]

    def _sampler(self, solver: str, num_steps: int, integer_timesteps: bool) -> Sampler:
        run = make_sampler(
            self.networks.velocity,
            solver,
            self.networks.levels(num_steps, self.latent_shape),
            integer_timesteps,
            self.networks.network_levels(num_steps, self.latent_shape),
            self.rollout.guidance_scale,
        )
        if not self.rollout.guided:
            return run

        def sample(
            params: Params, adapter: Adapter | None, cond: Conditioning, noise: jax.Array
        ) -> jax.Array:
            return run(params, adapter, cond, noise, self.negative)

        return sample

    def rollout_sampler(self) -> Sampler | NoisySampler:
        """The sampler of the run's rollouts; a `NoisySampler` where its solver is a stochastic one."""
        rollout = self.rollout
        if not is_stochastic(rollout):
            return self.sampler(rollout.solver, rollout.num_steps, rollout.integer_timesteps)
        velocity: PolicyVelocity = self.networks.velocity
        if rollout.guided:
            velocity = guided_policy(velocity, rollout.guidance_scale)
        run = make_transition_sampler(
            velocity,
            stochastic_of(rollout, self.networks, self.latent_shape),
            window_of(rollout).size,
            network_levels_of(rollout, self.networks, self.latent_shape),
        )

        def sample(
            params: Params,
            adapter: Adapter | None,
            cond: Conditioning,
            noise: jax.Array,
            path: NoisyPath,
        ) -> tuple[jax.Array, Transitions]:
            own: Any = cond
            if rollout.guided:
                own = GuidedConditioning(cond, repeated(self.negative, len(noise)))
            return run(params, adapter, own, noise, path.key, path.start)

        return sample

    @functools.cached_property
    def negative(self) -> Conditioning:
        """Conditioning [1, ...] of the negative prompt, on every device."""
        texts = [self.rollout.negative_prompt]
        cond = distributed.run_on_all("negative prompt", lambda: self.encode(texts))
        return device_mesh.replicate(self.mesh, cond)


def make_decoder(networks: Networks, size: Size, mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Latents to images or clips, decoded and kept where a batch's samples are scored."""
    decoder = Decoder(networks)
    frames = networks.frames_decoded_at_once(size.num_frames)

    def decode(latents: jax.Array) -> jax.Array:
        # A batch may have fewer samples than there are devices; then it lies on some of them.
        count = len(latents)
        layout = device_mesh.image_sharding(mesh, count)
        place = functools.partial(distributed.device_put_global, sharding=layout)
        at_once = decode_size(count, mesh, frames)
        clips = decoder(latents, at_once, place, device_mesh.image_shards(mesh, count))
        return place(as_samples(clips))

    return decode
