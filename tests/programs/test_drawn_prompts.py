"""The prompts that a run will draw, known before it begins."""

from marble_jax.config import default_config, settings_of
from marble_jax.programs.drawn_prompts import sampling_of, texts_to_draw
from marble_jax.prompts.files import Prompt
from marble_jax.training.batch_sizes import derive_sizes


def sampling(**rollout):
    config = default_config()
    config.rollout.update(prompts_per_step=4, images_per_prompt=6, batch_size=12, **rollout)
    config.training.micro_batch_size = 12
    config.prompts.sources = ("general", "ocr")
    settings = settings_of(config)
    prompts = {
        source: [Prompt(f"{source} {number}", source) for number in range(50)]
        for source in settings.prompts.sources
    }
    return sampling_of(settings, prompts, derive_sizes(settings.rollout, settings.training, 1))


def test_texts_are_those_of_the_steps_and_no_others():
    for draws in ("step", "batch"):
        chosen = sampling(prompt_draws=draws)
        texts = texts_to_draw(chosen, seed=7, first=0, last=3)
        drawn = [prompt.text for step in range(3) for prompt in chosen.draw(7, step).prompts]
        assert texts == list(dict.fromkeys(drawn)) and len(texts) < 13
        assert texts_to_draw(chosen, seed=7, first=3, last=3) == []
        # What is left after two steps, and what other random numbers draw.
        rest = [prompt.text for prompt in chosen.draw(7, 2).prompts]
        assert texts_to_draw(chosen, seed=7, first=2, last=3) == list(dict.fromkeys(rest))
        assert set(texts_to_draw(chosen, seed=8, first=0, last=3)) != set(texts)
