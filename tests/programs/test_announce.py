"""What a run says at its start of clips and of images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from marble_jax.api.settings import load_settings
from marble_jax.families.descriptions import Size
from marble_jax.programs import announce
from marble_jax.rewards.base import Reward
from marble_jax.rewards.frames import parse_frames


def run_of(num_frames: int) -> Any:
    """As much of a run as the lines ask for."""
    count = parse_frames("", "count:3")
    rewards = [
        Reward(name="motion", kind="device", takes="clips"),
        Reward(name="ocr", kind="host", frames=count),
        Reward(name="flicker", kind="device", takes="clips"),
        Reward(name="geneval", kind="host", frames=count),
    ]
    rollout = SimpleNamespace(prompts_per_step=3, images_per_prompt=4, num_steps=6)
    return SimpleNamespace(
        settings=SimpleNamespace(rollout=rollout),
        size=Size(16, 16, num_frames),
        sizes=SimpleNamespace(
            images=12, rollout_batches=1, timesteps=3, samples=36, micro_batches=3
        ),
        evaluator=SimpleNamespace(scorer=SimpleNamespace(rewards=rewards)),
    )


def test_the_frames_of_every_reward_are_said():
    """Also of those that are never trained on."""
    assert announce._frame_rows(run_of(5)) == [
        ("frames", "all: motion, flicker; count:3, mean of scores: ocr, geneval")
    ]
    assert announce._frame_rows(run_of(1)) == []


@pytest.mark.parametrize("num_frames, word", [(1, "images"), (5, "clips")])
def test_a_step_draws_clips_or_images(num_frames, word):
    assert announce._step_line(run_of(num_frames)).startswith(f"3 prompts x 4 = 12 {word} in 1 ")


@pytest.mark.parametrize(
    "objective, scale, said", [("awm", 4.5, True), ("awm", 1.0, False), ("nft", 4.5, False)]
)
def test_guidance_that_matching_does_not_train_is_named(objective, scale, said):
    changes = {"objective.name": objective, "rollout.guidance_scale": scale}
    line = announce._guidance_remark(load_settings("embedded:awm", changes))
    assert line.startswith("rollout.guidance_scale=4.5: ") == said and "\n" not in line
    assert bool(line) == said


@pytest.mark.parametrize(
    ("place", "chosen", "processes", "line"),
    [
        ("", "", 2, "text encoders stay in memory (prompts.embedding_cache takes them away)"),
        ("/home/me", "auto", 1, "embeddings in /home/me, no text encoder in memory"),
        (
            "/run/embeddings",
            "auto",
            8,
            "embeddings in /run/embeddings, no text encoder in memory; 8 processes encode a share each",
        ),
        (
            "/mine",
            "/mine",
            8,
            "embeddings in /mine, no text encoder in memory; 8 processes encode a share each, or all texts each unless "
            "they share the folder",
        ),
    ],
)
def test_where_text_embeddings_are(monkeypatch, place, chosen, processes, line):
    run = run_of(1)
    run.encode = SimpleNamespace(place=place)
    run.settings.prompts = SimpleNamespace(embedding_cache=chosen)
    monkeypatch.setattr(announce.distributed, "count", lambda: processes)
    assert announce._texts_line(run) == line


def test_what_rewards_that_compare_images_are_given():
    run = run_of(1)
    assert announce._group_rows(run) == []
    run.evaluator.scorer.rewards.append(Reward(name="rank", kind="host", needs_full_group=True))
    run.evaluator.images_per_prompt, run.evaluator.comparing = 2, ["rank"]
    run.settings.rewards = SimpleNamespace(train=("rank", "ocr"))
    assert announce._group_rows(run) == [
        ("compared", "images of a prompt, by rank: 4 in rollouts, 2 in evaluations")
    ]
    # Never trained on, and one image of each prompt.
    run.settings.rewards.train, run.evaluator.comparing = ("ocr",), []
    assert announce._group_rows(run) == [
        (
            "compared",
            "images of a prompt, by rank: in evaluations scored on single images (evaluation.images_per_prompt)",
        )
    ]
