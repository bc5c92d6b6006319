"""A training run as an object: trained, sampled, evaluated, exported, reported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marble_jax.api.sampling import draw, sampling_settings
from marble_jax.api.settings import load_settings
from marble_jax.cli.configuration import stated_keys
from marble_jax.config import Settings
from marble_jax.errors import InputError, one_of
from marble_jax.policies import TRAINED_POLICIES, check_policy
from marble_jax.programs.evaluate import evaluate
from marble_jax.programs.evaluation_request import Request, check_model_name
from marble_jax.programs.export import ExportOptions, export_run
from marble_jax.programs.locations import EMBEDDED, held_out_prompts
from marble_jax.programs.pipeline_cache import PipelineCache
from marble_jax.programs.policy_source import PolicySource
from marble_jax.programs.run_state import run_settings
from marble_jax.programs.train import train_run
from marble_jax.report import write_report
from marble_jax.storage.workdir import Workdir
from marble_jax.training.stops import Interrupted

if TYPE_CHECKING:
    from marble_jax.api.sampling import Sample

__all__ = ["Interrupted", "Run", "train"]


def train(
    settings: Settings | str, workdir: str | os.PathLike, changes: Mapping[str, Any] | None = None
) -> Run:
    """Trains a run on this machine, or goes on where an earlier call or `marble-jax train` stopped.

    Several hosts are trained by the command line, which has them find each other.

    Args:
      settings: of the run, or what `load_settings` makes them of.
      workdir: directory of the run.
      changes: values by dotted key, as of `load_settings`.

    Returns:
      The run.

    Raises:
      InputError: whatever does not fit, before anything is written.
      Interrupted: stopped by Ctrl-C or SIGTERM, state saved; the same call goes on.
    """
    chosen = load_settings(settings, changes)
    path = os.fspath(workdir)
    stated = None
    if isinstance(settings, str):
        # What a preset sets for other modes than its own is no news.
        stated = stated_keys(
            [f"--config={settings}", *(f"--config.{name}" for name in changes or {})]
        )
    train_run(chosen, path, "marble_jax.train", stated=stated)
    return Run(path)


class Run:
    """A training run in its directory, finished or not.

    Attributes:
      workdir: its directory.

    Raises:
      InputError: no run is there.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = os.fspath(workdir)
        self._workdir = Workdir(self.workdir)
        # Refused here, where the mistake is, and not by the first method.
        run_settings(self._workdir)
        self._pipelines = PipelineCache()

    def __repr__(self) -> str:
        return f"Run({self.workdir!r})"

    @property
    def settings(self) -> Settings:
        """Settings that the run was started with."""
        return run_settings(self._workdir)

    def metrics(self) -> list[dict[str, Any]]:
        """Records of all steps: figures by `room/name` or `room/name/reward`."""
        return self._workdir.read(self._workdir.metrics)

    def evaluations(self) -> list[dict[str, Any]]:
        """Records of all evaluations: mean scores with intervals, and gains over the base model."""
        return self._workdir.read(self._workdir.evaluations)

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        policy: str = "ema",
        lora: str = "",
        images: int = 1,
        **settings: Any,
    ) -> list[Sample]:
        """Images or clips of a policy of the run.

        Args:
          prompts: one text or several.
          policy: "ema", "current", "rollout", "best", or "base" for the model without the adapter.
          lora: LoRAs to add, `PATH[:weight],PATH[:weight]`.
          images: of each prompt; those of a prompt stand together.
          **settings: fields of `SamplingSettings` such as seed, num_steps, guidance; size and guidance are the run's
            unless they are given.

        Returns:
          For every image a Pillow image, or for every clip an array uint8 [F, H, W, 3].

        Raises:
          InputError: no checkpoint yet, or settings that do not fit the model.
        """
        check_policy("policy", policy)
        return draw(self._source(policy, lora), prompts, images, settings, self._pipelines)

    def evaluate(
        self,
        out: str | os.PathLike,
        *,
        policies: Sequence[str] = ("base", "ema"),
        models: Mapping[str, str] | None = None,
        prompts: str = "",
        rewards: Sequence[str] = (),
        num_prompts: int = 0,
        images: int = 1,
        **settings: Any,
    ) -> dict[str, Any]:
        """Draws, scores and compares policies of the run, and other models, on the same prompts and noise.

        Args:
          out: directory of images, scores and the page `index.html`; the same call goes on where it stopped.
          policies: of the run; gains are over the first one.
          models: other models by name: diffusers-layout directories or hub ids.
          prompts: files or directories as of `marble-jax evaluate`; unless given, the held-out prompts that the run
            itself evaluates on (`evaluation.num_prompts` of `evaluation.sources`).
          rewards: names of rewards of the run's; all that it trains on or holds out unless given.
          num_prompts: at most so many, in equal shares of the sources; 0: all.
          images: of each prompt.
          **settings: fields of `SamplingSettings`; the run's unless given.

        Returns:
          The summary: means with intervals, gains, and how often a model is better on all rewards at once.

        Raises:
          InputError: bad input, before anything is written.
        """
        sources = self._sources(policies, models or {})
        own = self.settings
        chosen = tuple(rewards) or (*own.rewards.train, *own.rewards.heldout)
        stated = {name for name in ("num_steps", "solver") if name in settings}
        request = Request(
            sources,
            prompts or own.prompts.path,
            num_prompts=num_prompts,
            images=images,
            rewards_path=own.rewards.path or EMBEDDED,
            rewards=chosen,
            frames=own.rewards.frames,
            frame_reduction=own.rewards.frame_reduction,
            # The noise of the run's own evaluations.
            settings=sampling_settings(**{"seed": own.evaluation.seed, **settings}),
            # Options have other names than fields.
            stated=frozenset("steps" if name == "num_steps" else name for name in stated),
            num_workers=own.rewards.num_workers,
            command="marble_jax.Run.evaluate",
            held_out=None if prompts else held_out_prompts(own.prompts, own.evaluation),
            upstream_scoring=own.rewards.upstream_scoring,
        )
        summary = evaluate(request, os.fspath(out))
        assert summary is not None, "every image was scored"
        return summary

    def export(self, out: str | os.PathLike, **options: Any) -> Path:
        """Exports a policy as a folder that diffusers, PEFT and ComfyUI open.

        Args:
          out: the new folder.
          **options: fields of `ExportOptions`: policy, step, styles, merge, dtype, verify, overwrite, prompt.

        Returns:
          The folder.

        Raises:
          InputError: no checkpoint, a place that is taken, or a verification that failed.
        """
        for name in options:
            one_of(
                "export option", name, [field.name for field in dataclasses.fields(ExportOptions)]
            )
        check_policy("policy", options.get("policy", "ema"), TRAINED_POLICIES)
        export_run(self.workdir, os.fspath(out), ExportOptions(**options))
        return Path(out)

    def report(self) -> Path:
        """Writes `report.html` into the run's directory; returns where it is."""
        return Path(write_report(self.workdir))

    def _sources(
        self, policies: Sequence[str], models: Mapping[str, str]
    ) -> dict[str, PolicySource]:
        """The policies of the run and the other models of an evaluation, by name.

        Raises:
          InputError: no such policy, a name that does not do or comes twice, or nothing at all.
        """
        sources: dict[str, PolicySource] = {}
        for policy in policies:
            check_policy("policies", policy)
            sources[policy] = self._source(policy)
        for name, model in models.items():
            check_model_name(name, f"{name}={model}")
            if name in sources:
                raise InputError(
                    f"models: expected another name than a policy's; received {name!r}"
                )
            sources[name] = PolicySource(model=model)
        if not sources:
            raise InputError("policies: expected at least one policy or model; received none")
        return sources

    def _source(self, policy: str, lora: str = "") -> PolicySource:
        return PolicySource(workdir=self.workdir, policy=policy, loras=lora)
